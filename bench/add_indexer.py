#!/usr/bin/env python3
"""Makes a DeepSeek-V3.2-shaped checkpoint of a V3-shaped one: the same tensors, and an indexer with random weights.

    bench/add_indexer.py SOURCE TARGET [--heads 64] [--head-dim 128] [--topk 2048]

Needs numpy, ml_dtypes, safetensors. Files of SOURCE are linked, not copied. Speed is what such a checkpoint is for.
"""
import argparse
import json
import pathlib

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

parser = argparse.ArgumentParser()
parser.add_argument("source", type=pathlib.Path)
parser.add_argument("target", type=pathlib.Path)
parser.add_argument("--heads", type=int, default=64)
parser.add_argument("--head-dim", type=int, default=128)
parser.add_argument("--topk", type=int, default=2048)
args = parser.parse_args()

args.target.mkdir(parents=True, exist_ok=True)
config = json.loads((args.source / "config.json").read_text())
config |= {
    "architectures": ["DeepseekV32ForCausalLM"],
    "model_type": "deepseek_v32",
    "index_n_heads": args.heads,
    "index_head_dim": args.head_dim,
    "index_topk": args.topk,
}
(args.target / "config.json").write_text(json.dumps(config, indent=1))

index = json.loads((args.source / "model.safetensors.index.json").read_text())
for name in set(index["weight_map"].values()):
    link = args.target / name
    if not link.exists():
        link.symlink_to((args.source / name).resolve())

random = np.random.default_rng(11)
hidden, rank = config["hidden_size"], config["q_lora_rank"]


def matrix(rows, columns):
    values = random.standard_normal((rows, columns), dtype=np.float32) * (0.7 / columns**0.5)
    return values.astype(ml_dtypes.bfloat16)


tensors = {}
for layer in range(config["num_hidden_layers"]):
    prefix = f"model.layers.{layer}.self_attn.indexer"
    tensors[f"{prefix}.wq_b.weight"] = matrix(args.heads * args.head_dim, rank)
    tensors[f"{prefix}.wk.weight"] = matrix(args.head_dim, hidden)
    tensors[f"{prefix}.k_norm.weight"] = np.ones(args.head_dim, dtype=ml_dtypes.bfloat16)
    tensors[f"{prefix}.k_norm.bias"] = np.zeros(args.head_dim, dtype=ml_dtypes.bfloat16)
    tensors[f"{prefix}.weights_proj.weight"] = matrix(args.heads, hidden)
file = "indexer.safetensors"
save_file(tensors, args.target / file)
index["weight_map"] |= dict.fromkeys(tensors, file)
(args.target / "model.safetensors.index.json").write_text(json.dumps(index))
