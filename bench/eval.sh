#!/usr/bin/env bash
# Accuracy of minnow over four expert processes: starts a cluster on a free port, runs eval.py, stops it.
#   bench/eval.sh [ARGUMENTS OF eval.py]
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
shoal=${SHOAL:-$root/target/release/shoal}
[ -x "$shoal" ] || { echo "eval.sh: $shoal is not there; build it: cargo build --release" >&2; exit 2; }
coproc up { exec "$shoal" --log-filter warn up --model "$root/models/minnow" --experts 4 --listen 127.0.0.1:0 --json; }
pid=$up_PID
trap 'kill "$pid" 2>/dev/null; wait "$pid" 2>/dev/null || true' EXIT
read -r line <&"${up[0]}" || { echo "eval.sh: the cluster did not start" >&2; exit 1; }
url=http://$(python3 -c 'import json,sys; print(next(m["address"] for m in json.loads(sys.argv[1])["members"] if m["name"] == "gateway"))' "$line")
python3 "$root/bench/eval.py" --url "$url" "$@"
