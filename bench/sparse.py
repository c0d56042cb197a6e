#!/usr/bin/env python3
"""Decode time a token over the context, sparse attention beside dense, as a picture (SVG) and its figures (JSON lines).

    bench/sparse.py SPARSE DENSE --cache-dir CACHE --contexts 2048,4096,8192,16384,32768 --out bench/sparse.svg

SPARSE is a V3.2-shaped checkpoint, DENSE the same without its indexer (`bench/add_indexer.py` makes the one of the other).
"""
import argparse
import json
import pathlib
import subprocess

parser = argparse.ArgumentParser()
parser.add_argument("sparse", type=pathlib.Path)
parser.add_argument("dense", type=pathlib.Path)
parser.add_argument("--shoal", default="target/release/shoal")
parser.add_argument("--cache-dir", required=True)
parser.add_argument("--weights", default="q8")
parser.add_argument("--contexts", default="2048,4096,8192,16384,32768")
parser.add_argument("--dense-contexts", help="[default: the same]")
parser.add_argument("--decode", type=int, default=64)
parser.add_argument("--experts", type=int, default=2)
parser.add_argument("--out", type=pathlib.Path, required=True)
args = parser.parse_args()

COLORS = {"sparse": "#0b6e99", "dense": "#b3541e"}


def measure(model, contexts):
    limit = max(map(int, contexts.split(","))) + args.decode
    command = [args.shoal, "bench", "--model", model, "--weights", args.weights, "--cache-dir", args.cache_dir, "--json"]
    command += ["--experts", args.experts, "--prefill", 0, "--batch", 1, "--context", contexts, "--decode", args.decode]
    command += ["--rounds", 1, "--warm-up", 0, f"--router-arg=--context-max={limit}"]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(done.stderr)
    figures = [json.loads(line) for line in done.stdout.splitlines()]
    return [(figure["context"], 1000 / figure["median"]) for figure in figures]


curves = {
    "sparse": measure(args.sparse, args.contexts),
    "dense": measure(args.dense, args.dense_contexts or args.contexts),
}
with args.out.with_suffix(".jsonl").open("w") as out:
    for name, points in curves.items():
        for context, milliseconds in points:
            print(json.dumps({"attention": name, "context": context, "ms_a_token": round(milliseconds, 2)}), file=out)

WIDTH, HEIGHT, LEFT, BOTTOM, TOP, RIGHT = 640, 360, 60, 50, 40, 90
largest = max(context for points in curves.values() for context, _ in points)
slowest = max(time for points in curves.values() for _, time in points) * 1.05
step = next(step for step in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000) if slowest / step <= 8)


def x(context):
    return LEFT + (WIDTH - LEFT - RIGHT) * context / largest


def y(time):
    return HEIGHT - BOTTOM - (HEIGHT - BOTTOM - TOP) * time / slowest


svg = [
    f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" font-family="sans-serif" font-size="12">',
    f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
    f'<text x="{LEFT}" y="22" font-size="14">Decode time a token over the context, ms</text>',
]
time = 0
while time <= slowest:
    svg.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(time):.1f}" y2="{y(time):.1f}" stroke="#ddd"/>')
    svg.append(f'<text x="{LEFT - 8}" y="{y(time) + 4:.1f}" text-anchor="end">{time}</text>')
    time += step
for context in sorted({context for points in curves.values() for context, _ in points}):
    if context >= largest / 10:
        svg.append(f'<text x="{x(context):.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{context // 1024}k</text>')
svg.append(f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 10}" text-anchor="middle">positions in the context</text>')
for name, points in curves.items():
    path = " ".join(f"{x(context):.1f},{y(time):.1f}" for context, time in points)
    svg.append(f'<polyline points="{path}" fill="none" stroke="{COLORS[name]}" stroke-width="2"/>')
    svg += [f'<circle cx="{x(context):.1f}" cy="{y(time):.1f}" r="3" fill="{COLORS[name]}"/>' for context, time in points]
    context, time = points[-1]
    svg.append(f'<text x="{x(context) + 8:.1f}" y="{y(time) + 4:.1f}" fill="{COLORS[name]}">{name} {time:.0f}</text>')
svg.append("</svg>")
args.out.write_text("\n".join(svg) + "\n")
for name, points in curves.items():
    print(name, ", ".join(f"{context}: {time:.1f} ms" for context, time in points))
