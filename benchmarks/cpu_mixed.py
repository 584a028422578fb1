"""Eight requests with 0, 1 and 8 adapters on a CPU: lorafx beside the compiled base and PEFT.

A Llama of hidden 1024, intermediate 2816 and 6 layers, LoRA of rank 16 on all its linears, fp32
and bf16, decode [8, 1] and prefill [8, 128]. Time over the compiled base model in the same run:

    python benchmarks/cpu_mixed.py [--quick] [--dtype fp32|bf16] [--case decode|prefill] [--rows 16]
                                   [--blocks 10]

With `--rows` so many requests a batch, with as many adapters as there are rows, at most eight.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from protocol import errors, rows_of, save, save_adapter
from transformers import LlamaConfig, LlamaForCausalLM

import lorafx

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
RANK = 16
ADAPTERS = 8
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
LENGTHS = {"decode": 1, "prefill": 128}


def build_model(layers: int, dtype: torch.dtype, **changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "hidden_size": 1024,
        "intermediate_size": 2816,
        "num_hidden_layers": layers,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "vocab_size": 4096,
        "max_position_embeddings": 512,
    }
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **changes})).to(dtype).eval()


def save_adapters(model: LlamaForCausalLM, folder: Path, count: int = ADAPTERS) -> dict[str, str]:
    """Adapters with non-zero B, saved by PEFT."""
    names = [f"a{index}" for index in range(count)]
    return {name: save_adapter(model, folder / name, RANK, TARGETS, std=0.02) for name in names}


def peft_mixed(model: LlamaForCausalLM, paths: dict[str, str]) -> PeftModel:
    names = list(paths)
    peft_model = PeftModel.from_pretrained(copy.deepcopy(model), paths[names[0]], names[0])
    for name in names[1:]:
        peft_model.load_adapter(paths[name], name)
    return peft_model.eval()


def run_case(
    dtype_name: str, case: str, layers: int, blocks: int, seconds: float, count: int = 8
) -> list[dict[str, object]]:
    dtype = DTYPES[dtype_name]
    model = build_model(layers, dtype)
    ids = torch.randint(0, model.config.vocab_size, (count, LENGTHS[case]))
    torch._dynamo.reset()
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        paths = save_adapters(model, Path(folder))
        base = torch.compile(copy.deepcopy(model))
        mixed = peft_mixed(model, paths)
        single_model = PeftModel.from_pretrained(copy.deepcopy(model), paths["a0"]).eval()
        single = torch.compile(single_model)
        names = [name for name, _ in zip(itertools.cycle(paths), ids, strict=False)]
        most = len(set(names))
        options = {"start": "compiled"}
        cm = lorafx.compile(copy.deepcopy(model), dict(paths), options=options)

        def serve(adapter_names: Sequence[str | None]):
            return lambda: cm(input_ids=ids, use_cache=False, adapter_names=adapter_names)

        mixed_names = [*names[:-1], None] if count > 1 else names
        found = errors(model, paths, serve(mixed_names)().logits, ids, mixed_names)
        error = max(ours / merged for ours, merged in found)

        arms = {
            "lorafx D=0": serve([None] * count),
            "lorafx D=1": serve([names[0]] * count),
            f"lorafx D={most}": serve(names),
            f"PEFT mixed, eager, D={most}": lambda: mixed(
                input_ids=ids, use_cache=False, adapter_names=names
            ),
            "PEFT one adapter, compiled": lambda: single(input_ids=ids, use_cache=False),
        }
        label = f"{case} {list(ids.shape)} {dtype_name}"
        print(f"\n{label}, {layers} layers; error over a merged model's own rounding: {error:.2f}")
        plain = partial(base, input_ids=ids, use_cache=False)
        rows = rows_of(label, plain, arms, blocks=blocks, seconds=seconds)
    return [row | {"error_over_rounding": error} for row in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="2 layers, 5 blocks; nothing saved")
    parser.add_argument("--dtype", choices=DTYPES, action="append")
    parser.add_argument("--case", choices=LENGTHS, action="append")
    parser.add_argument("--rows", type=int, nargs="+", default=[8])
    parser.add_argument("--blocks", type=int, default=20, help="of each arm, by turns")
    parser.add_argument("--out", default="benchmarks/results/cpu_mixed.json")
    options = parser.parse_args()
    layers, blocks, seconds = (2, 5, 0.02) if options.quick else (6, options.blocks, 0.1)
    rows = []
    for dtype in options.dtype or DTYPES:
        for case in options.case or LENGTHS:
            for count in options.rows:
                rows += run_case(dtype, case, layers, blocks, seconds, count)
    if not options.quick:
        save(Path(options.out), "time over compiled base, Llama 1024/2816, r=16", rows)


if __name__ == "__main__":
    main()
