#!/usr/bin/env python3
"""Accuracy of minnow through the HTTP API, one line a family, beside the figures of models/minnow/README.md.

    bench/eval.py [--url http://127.0.0.1:8000] [--data models/minnow/eval.jsonl] [--concurrency 8] [--json OUT]

Greedy, scored as models/minnow/train/eval.py does. Exit code 1 if a family is more than one problem in thirty below its
reference. Python's standard library is enough.
"""
import argparse, collections, concurrent.futures, json, pathlib, sys, time, urllib.request

REFERENCE = {"addition": (34, 39), "subtraction": (39, 39), "multiplication": (39, 39), "sequence": (39, 39),
             "word_problem": (39, 39), "count_letter": (39, 39), "reverse_word": (38, 38), "day": (38, 38),
             "units": (38, 38), "logic": (38, 38), "roman": (38, 38), "story": (38, 38), "chat": (38, 38)}


def ask(url, messages):
    body = json.dumps(dict(model=MODEL, messages=messages, temperature=0, max_tokens=220)).encode()
    request = urllib.request.Request(url + "/v1/chat/completions", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=300) as reply:
        reply = json.load(reply)
    message = reply["choices"][0]["message"]
    return (message["content"] or "").strip(), reply["usage"]["completion_tokens"]


def right(problem, answer):
    if problem["family"] == "story":
        return len(answer) > 200 and answer.startswith("Once")
    return answer == problem["answer"]


def main():
    global MODEL
    root = pathlib.Path(__file__).resolve().parent.parent
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--url", default="http://127.0.0.1:8000")
    p.add_argument("--data", default=str(root / "models/minnow/eval.jsonl"))
    p.add_argument("--concurrency", type=int, default=8)
    p.add_argument("--json", help="write the counts here too")
    a = p.parse_args()
    with urllib.request.urlopen(a.url + "/v1/models", timeout=10) as reply:
        MODEL = json.load(reply)["data"][0]["id"]
    problems = [json.loads(line) for line in open(a.data, encoding="utf-8")]
    started = time.time()
    with concurrent.futures.ThreadPoolExecutor(a.concurrency) as pool:
        answers = list(pool.map(lambda problem: ask(a.url, problem["messages"]), problems))
    seconds = time.time() - started
    good, total = collections.Counter(), collections.Counter()
    for problem, (answer, _) in zip(problems, answers):
        total[problem["family"]] += 1
        good[problem["family"]] += right(problem, answer)
    low = []
    print(f"{'FAMILY':15} {'RIGHT':>7} {'README':>7}")
    for family in total:
        reference = REFERENCE.get(family)
        shown = f"{reference[0]}/{reference[1]}" if reference else "-"
        below = reference and good[family] / total[family] < reference[0] / reference[1] - 1 / 30
        low += [family] if below else []
        print(f"{family:15} {good[family]:3}/{total[family]:<3} {shown:>7}{'  below' if below else ''}")
    tokens = sum(n for _, n in answers)
    print(f"{'all':15} {sum(good.values()):3}/{sum(total.values()):<3} 495/500")
    print(f"{tokens} tokens in {seconds:.1f} s, {a.concurrency} at once")
    if a.json:
        json.dump({f: [good[f], total[f]] for f in total}, open(a.json, "w"))
    return 1 if low else 0


if __name__ == "__main__":
    sys.exit(main())
