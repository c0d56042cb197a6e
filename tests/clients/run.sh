#!/usr/bin/env bash
# Real clients against a cluster on a free port: the official OpenAI client, and a gRPC client that knows reflection only.
#   tests/clients/run.sh [VENV]
# Needs target/release/shoal, and python3 with venv (Debian: apt-get install python3-venv). VENV is made if it is not there.
set -euo pipefail
root=$(cd "$(dirname "$0")/../.." && pwd)
here=$root/tests/clients
venv=${1:-$root/target/clients-venv}
shoal=${SHOAL:-$root/target/release/shoal}
[ -x "$shoal" ] || { echo "run.sh: $shoal is not there; build it: cargo build --release" >&2; exit 2; }
command -v python3 >/dev/null || { echo "run.sh: python3 is missing (Debian: apt-get install python3-venv)" >&2; exit 2; }
if [ ! -x "$venv/bin/python" ]; then
  python3 -m venv "$venv" || { echo "run.sh: python3 lacks venv (Debian: apt-get install python3-venv)" >&2; exit 2; }
fi
"$venv/bin/pip" install -q -r "$here/requirements.txt"

coproc up { exec "$shoal" --log-filter warn up --model "$root/models/minnow" --experts 2 --listen 127.0.0.1:0 --json; }
pid=$up_PID
trap 'kill "$pid" 2>/dev/null; wait "$pid" 2>/dev/null || true' EXIT
read -r line <&"${up[0]}" || { echo "run.sh: the cluster did not start" >&2; exit 1; }
gateway='import json,sys; print(next(m["address"] for m in json.loads(sys.argv[1])["members"] if m["name"] == "gateway"))'
address=$(python3 -c "$gateway" "$line")
"$venv/bin/python" "$here/openai_chat.py" "$address"
"$venv/bin/python" "$here/reflected_chat.py" "$address"
