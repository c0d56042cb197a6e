#!/usr/bin/env python3
"""shoal and llama.cpp on the same weights, side by side: one after the other in each round, medians and their ratios.

    bench/compare.py MODEL GGUF --peer llama.cpp/build/bin --weights q8 --cache-dir CACHE [--rounds 3] [--experts 2]

MODEL is a folder with safetensors, GGUF the same weights at as many bits: Q8_0 for q8, Q4_0 for q4. PEER has llama-bench,
llama-batched-bench and ggml-rpc-server, built with GGML_NATIVE and GGML_RPC. The machine should do nothing else.
"""
import argparse
import json
import pathlib
import socket
import statistics
import subprocess
import time

parser = argparse.ArgumentParser()
parser.add_argument("model", type=pathlib.Path)
parser.add_argument("gguf", type=pathlib.Path)
parser.add_argument("--peer", type=pathlib.Path, required=True)
parser.add_argument("--shoal", default="target/release/shoal")
parser.add_argument("--weights", choices=["q8", "q4"], default="q8")
parser.add_argument("--cache-dir", required=True)
parser.add_argument("--experts", type=int, default=2)
parser.add_argument("--threads", type=int, default=2, help="of llama.cpp, and of each of its RPC workers")
parser.add_argument("--rounds", type=int, default=3)
parser.add_argument("--skip", nargs="*", default=[], choices=["rpc", "batch", "local"])
args = parser.parse_args()

PREFILL, DECODE, BATCH, CONTEXT = 512, 64, 16, 8


def run(command):
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"{command[0]} failed: {done.stderr.strip()[-2000:]}")
    return done.stdout


def shoal(experts, batches):
    command = [args.shoal, "bench", "--model", args.model, "--weights", args.weights, "--cache-dir", args.cache_dir]
    command += ["--experts", experts, "--prefill", PREFILL, "--decode", DECODE, "--context", CONTEXT, "--rounds", 1]
    command += ["--batch", ",".join(map(str, batches)), "--json"]
    figures = {}
    for line in run(command).splitlines():
        figure = json.loads(line)
        figures["prefill" if figure["what"] == "prefill" else f"decode {figure['batch']}"] = figure["median"]
    return figures


def llama(*flags):
    command = [args.peer / "llama-bench", "-m", args.gguf, "-p", PREFILL, "-n", DECODE, "-t", args.threads, "-r", 1, "-lm", "none", "-o", "json"]
    results = json.loads(run([*command, *flags]))
    return {"prefill" if result["n_gen"] == 0 else "decode 1": result["avg_ts"] for result in results}


def llama_rpc():
    ports = []
    for _ in range(2):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            ports.append(free.getsockname()[1])
    workers = [
        subprocess.Popen(
            [args.peer / "ggml-rpc-server", "-p", str(port), "-t", str(args.threads)],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )
        for port in ports
    ]
    try:
        for port in ports:
            while True:
                try:
                    socket.create_connection(("127.0.0.1", port)).close()
                    break
                except OSError:
                    time.sleep(0.05)
        return llama("-ngl", "99", "--rpc", ",".join(f"127.0.0.1:{port}" for port in ports))
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()


def llama_batch():
    command = [args.peer / "llama-batched-bench", "-m", args.gguf, "-c", 4096, "-npp", CONTEXT, "-ntg", DECODE, "-lm", "none"]
    out = run([*command, "-npl", BATCH, "-t", args.threads, "--output-format", "jsonl"])
    result = json.loads(next(line for line in out.splitlines() if line.startswith("{")))
    return {f"decode {BATCH}": result["speed_tg"]}


figures = {}
for _ in range(args.rounds):
    subjects = [("shoal", lambda: shoal(args.experts, [1, BATCH])), ("llama.cpp", llama)]
    if "local" not in args.skip:
        subjects.insert(0, ("shoal, one process", lambda: shoal(0, [1, BATCH])))
    if "batch" not in args.skip:
        subjects.append(("llama.cpp", llama_batch))
    if "rpc" not in args.skip:
        subjects.append(("llama.cpp, two RPC workers", llama_rpc))
    for name, measure in subjects:
        for case, rate in measure().items():
            figures.setdefault(name, {}).setdefault(case, []).append(rate)

def bytes_per_token():
    """Of the matrices that a token of a DeepSeek-V3 model goes through, as shoal stores them: 32 numbers and a scale."""
    config = json.loads((args.model / "config.json").read_text())
    hidden, heads, latent = config["hidden_size"], config["num_attention_heads"], config["kv_lora_rank"]
    nope, rope, value = config["qk_nope_head_dim"], config["qk_rope_head_dim"], config["v_head_dim"]
    attention = config["q_lora_rank"] * (hidden + heads * (nope + rope)) + hidden * (latent + rope)
    attention += heads * (latent * (nope + value) + value * hidden)
    experts = config["num_experts_per_tok"] + config["n_shared_experts"]
    dense = config["first_k_dense_replace"]
    feed_forward = 3 * hidden * dense * config["intermediate_size"]
    feed_forward += 3 * hidden * (config["num_hidden_layers"] - dense) * experts * config["moe_intermediate_size"]
    per_number = {"q8": 34 / 32, "q4": 18 / 32}
    matrices = config["num_hidden_layers"] * attention + feed_forward
    return matrices * per_number[args.weights] + config["vocab_size"] * hidden * per_number["q8"]


def read_rate():
    """Bytes a second that all cores read together."""
    lines = map(json.loads, run([args.shoal, "bench", "--kernels", "--json"]).splitlines())
    return max(line["limit"] for line in lines if line["unit"] == "GB/s") * 1e9


print(f"{args.weights}, router and {args.experts} expert processes, medians of {args.rounds} rounds, tokens/s (spread)")
ours = figures["shoal"]
for name, cases in figures.items():
    for case, rates in cases.items():
        median = statistics.median(rates)
        line = f"{name:28} {case:10} {median:7.1f}  ({min(rates):.1f}-{max(rates):.1f})"
        if name != "shoal":
            line += f"  shoal is {statistics.median(ours[case]) / median:.2f} x"
        print(line)

share = bytes_per_token() * statistics.median(ours["decode 1"]) / read_rate()
print(f"decode 1 of shoal reads {bytes_per_token() / 1e6:.0f} MB a token: {share:.0%} of what all cores read")
