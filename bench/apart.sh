#!/bin/sh
# `shoal bench` with the router on core 0 and one expert server on core 1, a thread each, as if they were two machines.
#
#     bench/apart.sh MODEL --cache-dir CACHE --prefill 512 --batch 16,64 --router-arg=--half-batches=always
set -eu
shoal=${SHOAL:-target/release/shoal}
model=$1
shift
"$shoal" bench --model "$model" --weights q8 --experts 1 --router-arg=--threads=1 --expert-arg=--threads=1 "$@" &
bench=$!
# Before the first figure counts; threads that start later inherit it.
for _ in 1 2 3 4 5 6 7 8 9 10; do
    sleep 0.3
    for child in $(pgrep -P "$bench"); do
        case $(tr '\0' ' ' <"/proc/$child/cmdline") in
        *" router "*) taskset -acp 0 "$child" ;;
        *" expert "*) taskset -acp 1 "$child" ;;
        esac
    done >/dev/null
done
wait "$bench"
