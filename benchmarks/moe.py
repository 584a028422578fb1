"""Routed experts: eight requests with 0, 1 and 8 adapters beside the model without LoRA.

    python benchmarks/moe.py [--quick] [--dtype fp32|bf16] [--case decode|prefill] [--experts int8]

A model like Qwen3-30B-A3B, half as wide with half as many experts (hidden 1024, 64 experts of 384,
top 8, two layers), LoRA of rank 16 on attention, experts and routers, saved by PEFT. Time over the
same model under torch.compile in the same run. Of transformers' ways to compute experts two can be
compiled into one graph: grouped_mm, its default, and batched_mm, which reads a weight for each row
and so is for decode alone. lorafx is compared with the base that computes them in the same way, and
the two bases with each other. PEFT serves one adapter, eagerly: it refuses mixed batches here, and
torch.compile breaks its graph at every parameter.

Experts in int8 (torchao) and nf4 (bitsandbytes) are computed by lorafx's implementation, also in
the base; beside it stands the base by transformers' "eager", a loop that no graph has.

On a GPU `make gpu` measures one layer of the real sizes in bf16, decode [64, 1] and prefill
[8, 1024].
"""

from __future__ import annotations

import argparse
import copy
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gpu_protocol
import moe_cases
import torch
from gpu_job import Context
from peft import PeftModel
from protocol import as_row, compare, machine, names_of, save
from torch import Tensor

import lorafx

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SHAPES = {"decode": (8, 1), "prefill": (8, 128)}
#: (dtype, case, transformers' way to compute experts), the most telling first
CASES = (
    ("fp32", "decode", "grouped_mm"),
    ("bf16", "decode", "grouped_mm"),
    ("fp32", "prefill", "grouped_mm"),
    ("bf16", "prefill", "grouped_mm"),
    ("fp32", "decode", "batched_mm"),
    ("bf16", "decode", "batched_mm"),
    ("fp32", "decode", "int8"),
    ("fp32", "decode", "nf4"),
    ("bf16", "decode", "int8"),
    ("bf16", "decode", "nf4"),
)
ADAPTERS = 8
#: Most time over the base by (case, adapters), the goals of docs/performance.md for dense models.
GOALS = {
    ("decode", 0): 1.005,
    ("decode", 1): 1.05,
    ("decode", 8): 1.12,
    ("prefill", 0): 1.005,
    ("prefill", 1): 1.04,
    ("prefill", 8): 1.06,
}
#: The same with quantised experts.
STORED_GOAL = 1.15
GPU_SHAPES = {"decode": (64, 1), "prefill": (8, 1024)}
#: Least throughput over the base on a GPU, whatever the mix.
GPU_GOAL = 0.92
#: Largest error on a GPU over that of the merged model in the same dtype.
ROUNDING = 10.0
RESULTS = Path("benchmarks/results/moe_cpu.json")
TITLE = (
    "time over the compiled base, Qwen3-MoE of hidden 1024, 64 experts of 384, top 8, two layers, "
    "r=16 on attention, experts and routers; PEFT on a mixed batch: "
)
PEFT_BLOCKS = 5  # its intervals lie far from the others'


def say(*words: object) -> None:
    print(time.strftime("%H:%M:%S"), *words, flush=True)


def step(model: Callable[..., Any], ids: Tensor, **more: Any) -> Callable[[], Tensor]:
    return lambda: model(input_ids=ids, use_cache=False, **more).logits


def run_case(
    dtype_name: str, kind: str, implementation: str, options: argparse.Namespace
) -> list[dict[str, object]]:
    """Rows of results of one case."""
    layers, blocks, seconds = (1, 5, 0.02) if options.quick else (2, 20, 0.05)
    shape = SHAPES[kind]
    label = f"{kind} {list(shape)} {dtype_name} {implementation}"
    torch._dynamo.reset()
    model = moe_cases.build_model("cpu", layers, DTYPES[dtype_name])
    stored = moe_cases.quantised(model, implementation)  # and model gets its numbers
    model.set_experts_implementation("grouped_mm" if stored else implementation)
    served = stored or model
    ids = torch.randint(model.config.vocab_size, shape)
    chosen = moe_cases.routes(model, ids)
    with tempfile.TemporaryDirectory() as folder:
        paths = moe_cases.save_adapters(model, Path(folder), ADAPTERS)
        say(f"{label}: {moe_cases.touched(chosen):.0f} experts a layer touched; compiling")
        twin, start = moe_cases.twin(served), {"start": "compiled"}
        cm = lorafx.compile(twin, dict(paths), options=start)

        error, own_error = moe_cases.largest_errors(model, paths, cm, ids)
        arms = {
            f"lorafx D={distinct}": step(cm, ids, adapter_names=names_of(shape[0], distinct))
            for distinct in (0, 1, ADAPTERS)
        }
        base = step(torch.compile(moe_cases.twin(served)), ids)
        if stored:
            loop = moe_cases.twin(stored)
            loop.set_experts_implementation("eager")
            arms["base by transformers' loop"] = step(loop, ids)
        if kind == "decode" and implementation == "grouped_mm":
            other = moe_cases.twin(model)
            other.set_experts_implementation("batched_mm")
            arms["base by batched_mm"] = step(torch.compile(other), ids)
        load = os.getloadavg()[0]
        ratios = compare(base, arms, blocks=blocks, seconds=seconds)
        if implementation == "grouped_mm":
            say("PEFT, one adapter")
            single = PeftModel.from_pretrained(copy.deepcopy(model), paths["a0"]).eval()
            few = min(PEFT_BLOCKS, blocks)
            alone = {"PEFT one adapter, eager": step(single, ids)}
            ratios += compare(base, alone, blocks=few, seconds=seconds)[1:]
    say(f"{label}: error {error:.2e}, a merged model's own {own_error:.2e}; load {load:.1f}")
    about = {
        "error": error,
        "error_of_merged": own_error,
        "experts_touched": moe_cases.touched(chosen),
        "load": [load, os.getloadavg()[0]],
    }
    floors = {
        f"lorafx D={d}": (
            None if stored else moe_cases.floor_of(model, ids, chosen, d),
            STORED_GOAL if stored and d else GOALS[kind, d],
        )
        for d in (0, 1, ADAPTERS)
    }
    rows = []
    for ratio in ratios:
        floor, goal = floors.get(ratio.arm, (None, None))
        text = f"; floor {floor:.3f}" if floor else ""
        if goal:
            # A claim needs the bound of the interval.
            text += f"; goal {goal} {'reached' if ratio.high <= goal else 'not reached'}"
        print(f"  {ratio.arm:24s} {ratio}{text}", flush=True)
        rows.append(as_row(label, ratio) | {"floor": floor, "goal": goal} | about)
    return rows


def machine_and_load() -> dict[str, object]:
    """The machine, and how busy it was when the results were written."""
    return {**machine(), "load": [round(load, 1) for load in os.getloadavg()]}


def on_cpu(options: argparse.Namespace) -> None:
    rows: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        refusal = moe_cases.peft_refusal(Path(folder))
        print(f'PEFT on a mixed batch: "{refusal}"')
        for dtype, kind, implementation in CASES:
            asked = implementation in (options.experts or {case[2] for case in CASES})
            if asked and dtype in (options.dtype or DTYPES) and kind in (options.case or SHAPES):
                rows += run_case(dtype, kind, implementation, options)
                if not options.quick:  # what is measured outlives a run that is ended early
                    save(options.out or RESULTS, TITLE + refusal, rows, machine_and_load)


def run_on_gpu(context: Context, *, phase: str) -> None:
    """Job: decode or prefill of one layer of the real sizes, every arm a CUDA graph. The layer's
    experts are 20 times an H200's cache, so weights are not rotated."""
    context.measure({phase: phase}, lambda phase: gpu_case(phase, context))


def gpu_case(phase: str, context: Context) -> list[dict[str, Any]]:
    """Rows of results of one batch through one layer."""
    shape, dtype, size = GPU_SHAPES[phase], torch.bfloat16, "real"
    if context.tiny:
        shape, dtype, size = (3, min(2, shape[1])), torch.float32, "tiny"
    meter = gpu_protocol.Meter(context.device, seconds=0.02)
    with tempfile.TemporaryDirectory() as folder:
        model = moe_cases.build_model(size, 1, dtype, context.device)
        paths = moe_cases.save_adapters(model, Path(folder), 2 if context.tiny else ADAPTERS)
        backend = "eager" if context.tiny else "inductor"
        base = torch.compile(moe_cases.twin(model), dynamic=False, backend=backend)
        cm = lorafx.compile(moe_cases.twin(model), dict(paths), options={"lowering": "triton"})
        ids = torch.randint(model.config.vocab_size, shape, device=context.device)
        chosen = moe_cases.routes(model, ids)
        error, own_error = moe_cases.largest_errors(model, paths, cm, ids)
        if not error < ROUNDING * own_error:
            raise RuntimeError(f"{phase}: off by {error:.2e}, a merged model by {own_error:.2e}")
        mixes = {f"lorafx D={d}": d for d in sorted({0, 1, len(paths)})}
        calls = {
            name: step(cm, ids, adapter_names=names_of(len(ids), d)) for name, d in mixes.items()
        }
        label = (
            f"{phase} {list(shape)} {'fp32' if context.tiny else 'bf16'}, one layer of {size} sizes"
        )
        rows = meter.compare_steps(label, step(base, ids), calls)
        about = {"goal": GPU_GOAL, "error": error, "error_of_merged": own_error}
        floors = {name: moe_cases.floor_of(model, ids, chosen, d) for name, d in mixes.items()}
        return [row | about | {"floor": floors.get(row["arm"])} for row in rows]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="1 layer, 5 blocks; nothing saved")
    parser.add_argument("--dtype", choices=DTYPES, action="append")
    parser.add_argument("--case", choices=SHAPES, action="append")
    parser.add_argument("--experts", choices={case[2] for case in CASES}, action="append")
    parser.add_argument("--out", type=Path)
    on_cpu(parser.parse_args(arguments))


if __name__ == "__main__":
    main()
