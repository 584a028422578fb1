"""What Options(batch_invariant=True) costs on a CPU: steps, products, attention, with over without.

A Llama (hidden 1024, intermediate 2816, 16 heads of queries and 4 of keys), adapters of rank 16 on
all linears, one in each row: prompts of some length, and decode steps by one token (a prompt of one
token each). Below it the parts: products of these linears, the generated kernel for any number of
rows over what is chosen by size, and causal attention.

    python benchmarks/batch_invariant.py [--quick] [--dtype fp32|bf16] [--threads 2]
"""

from __future__ import annotations

import argparse
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
from cpu_mixed import build_model, save_adapters
from dense_rows import DTYPES, SHAPES
from protocol import rows_of, save

import lorafx
from lorafx.kernels.cpu.dense_attention import ATTENTION, GENERATED, AttentionForm
from lorafx.kernels.cpu.weight_mm import WEIGHT_MM, ready
from lorafx.kernels.cpu.weight_source import WeightSpec

TITLE = "batch_invariant over without, Llama 1024/2816, r=16, CPU"
#: (requests, tokens each)
STEPS = ((1, 1), (8, 1), (1, 128), (8, 128))
ROWS = (1, 8, 64, 128, 1024)


def steps(weights: str, layers: int, folder: Path, **settings: Any) -> list[dict[str, Any]]:
    models = []
    for same in (False, True):
        model = build_model(layers, DTYPES[weights], num_key_value_heads=4)
        paths = save_adapters(model, folder / str(same))
        options = {"start": "compiled", "batch_invariant": same}
        models.append(lorafx.compile(model, dict(paths), options=options))
    found = []
    for requests, tokens in STEPS:
        ids = torch.randint(0, 1000, (requests, tokens))
        names = [[*paths][row % len(paths)] for row in range(requests)]
        base, fixed = (partial(model, input_ids=ids, adapter_names=names) for model in models)
        assert torch.equal(fixed().logits[:1], models[1](ids[:1], adapter_names=names[:1]).logits)
        case = f"{weights}, {requests} requests of {tokens} tokens"
        found += rows_of(case, base, {"step": fixed}, **settings)
    return found


def parts(weights: str, **settings: Any) -> list[dict[str, Any]]:
    dtype, found = DTYPES[weights], []
    assert ready(WeightSpec(dtype, dtype))
    for shape, (N, K) in SHAPES.items():
        weight = torch.randn(N, K).to(dtype)
        for rows in ROWS:
            call = partial(WEIGHT_MM, torch.randn(rows, K).to(dtype), weight)
            arms = {"product": partial(call, fixed=True)}
            found += rows_of(f"{weights} {shape}, {rows} rows", call, arms, **settings)
    for requests, tokens in ((8, 1), (1, 128), (1, 1024)):
        query = torch.randn(requests, 16, tokens, 64).to(dtype)
        keys, values = (torch.randn(requests, 4, max(tokens, 512), 64).to(dtype) for _ in range(2))
        for fixed in (False, True):
            assert GENERATED.ready(AttentionForm.of(query, keys, values, None, fixed=fixed))
        call = partial(ATTENTION, query, keys, values, [], tokens > 1, 0.125)
        arms = {"attention": partial(call, True)}
        case = f"{weights} attention, {requests} requests of {tokens} queries"
        found += rows_of(case, call, arms, **settings)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="1 layer, 5 blocks; nothing saved")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), action="append")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--parts", action="store_true", help="no whole steps")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/batch_invariant.json"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    layers, blocks, seconds = (1, 5, 0.02) if options.quick else (4, 15, 0.1)
    found: list[dict[str, Any]] = []
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        for weights in options.dtype or ("fp32", "bf16"):
            found += parts(weights, blocks=blocks, seconds=seconds)
            if not options.parts:
                where = Path(folder, weights)
                found += steps(weights, layers, where, blocks=blocks, seconds=seconds)
    if not options.quick:
        save(options.out, TITLE, found)


if __name__ == "__main__":
    main()
