#!/usr/bin/env python3
"""Golden text on real tokenizers, through `shoal text`: every case of cases/*.jsonl, a line a file.

    tests/text/get.sh target/tokenizers && tests/text/check.py --tokenizers target/tokenizers [--shoal target/release/shoal]

The cases hold what Hugging Face tokenizers and transformers give. Decode cases are decoded one id at a time, and the
pieces must join to the same text. Exit code 1 on any difference.
"""
import argparse, json, pathlib, subprocess, sys, tempfile

# File of cases → tokenizer, chat format.
FILES = {"deepseek-v3": ("deepseek-v3", None), "qwen3": ("qwen3", None), "gpt-oss": ("gpt-oss", None),
         "deepseek-v3.2": ("deepseek-v3", "deepseek-v3.2"), "deepseek-v4": ("deepseek-v4", "deepseek-v4")}


def agrees(case, answer):
    if case.get("error"):
        return "error" in answer
    if case["kind"] == "chat":
        return answer.get("prompt") == case["prompt"] and ("ids" not in case or answer.get("ids") == case["ids"])
    key = "ids" if case["kind"] == "encode" else "text"
    return answer.get(key) == case[key]


def main():
    here = pathlib.Path(__file__).resolve().parent
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--tokenizers", required=True)
    p.add_argument("--shoal", default=str(here.parent.parent / "target/release/shoal"))
    a = p.parse_args()
    failed = 0
    for name, (tokenizer, chat_format) in FILES.items():
        path = here / "cases" / f"{name}.jsonl"
        with tempfile.NamedTemporaryFile("r", suffix=".jsonl", encoding="utf-8") as out:
            command = [a.shoal, "text", f"{a.tokenizers}/{tokenizer}", "--cases", str(path), "--out", out.name]
            subprocess.run(command + (["--chat-format", chat_format] if chat_format else []), check=True)
            answers = [json.loads(line) for line in open(out.name, encoding="utf-8")]
        cases = [json.loads(line) for line in open(path, encoding="utf-8")]
        wrong = [(c, x) for c, x in zip(cases, answers) if not agrees(c, x)]
        wrong += [(c, {"error": "no answer"}) for c in cases[len(answers):]]
        print(f"{name:15} {len(cases) - len(wrong):4}/{len(cases)}")
        for case, answer in wrong[:3]:
            print("  case  ", json.dumps(case, ensure_ascii=False)[:600])
            print("  answer", json.dumps(answer, ensure_ascii=False)[:600])
        failed += len(wrong)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
