"""The generated delta kernels by themselves: the GEMMs of a Llama, with and without their deltas.

Four products a layer (q/k/v packed, o, gate/up packed, down; hidden 1024, intermediate 2816), 6
layers with weights and banks of their own, 8 requests, rank 16. The base arm is the products alone;
the ratio is what the LoRA part costs on top of them, so a whole model's is lower:

    python benchmarks/kernel_cpu.py [--blocks 10] [--dtype fp32|bf16] [--case decode|prefill]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import torch
from protocol import as_row, compare, save

from lorafx.kernels.cpu.delta_kernels import build_all
from lorafx.kernels.ops.delta_spec import DeltaSpec

LAYERS, REQUESTS, RANK = 6, 8, 16
PACKS = {"qkv": (1024, (1024,) * 3), "o": (1024, (1024,)), "gate_up": (1024, (2816,) * 2)}
PACKS["down"] = (2816, (1024,))
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
ROWS = {"decode": 1, "prefill": 128}
Step = Callable[[], object]


def specs_of(dtype: torch.dtype) -> dict[str, DeltaSpec]:
    """The delta of each pack."""
    return {
        name: DeltaSpec(
            *(dtype, dtype, dtype, K, RANK, len(sizes), sum(sizes), tuple(range(len(sizes)))),
            offsets=tuple(sum(sizes[:j]) for j in range(len(sizes))),
            sizes=sizes,
        )
        for name, (K, sizes) in PACKS.items()
    }


def bank_of(pack: str, slots: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """A, B, ranks and scales of so many slots with adapters."""
    K, sizes = PACKS[pack]
    G, N = len(sizes), sum(sizes)
    return (
        torch.randn(slots, RANK, G * K).to(dtype),
        torch.randn(slots, RANK, N).to(dtype),
        torch.full((slots, G), RANK, dtype=torch.int32),
        torch.full((slots, G), 1e-3),
    )


def arms(dtype: torch.dtype, rows: int, distinct: int) -> tuple[Step, dict[str, Step]]:
    """The products alone, and the products with deltas of `distinct` adapters."""
    owners = [j % distinct if distinct else -1 for j in range(REQUESTS)]
    slots = torch.tensor(owners, dtype=torch.int32)
    specs = specs_of(dtype)
    kernels = build_all(specs.values())
    calls = []
    for name in list(PACKS) * LAYERS:
        K, sizes = PACKS[name]
        G, N = len(sizes), sum(sizes)
        bank = (*bank_of(name, REQUESTS, dtype), slots)
        x, weight = torch.randn(REQUESTS * rows, K).to(dtype), torch.randn(N, K).to(dtype)
        generated = kernels[specs[name]]
        ranges = (list(range(G)), list(specs[name].offsets), list(sizes))
        calls.append((x, weight.T, bank, ranges, generated))

    def base() -> None:
        for x, weight, *_ in calls:
            torch.mm(x, weight)

    def generated() -> None:
        for x, weight, bank, _, kernel in calls:
            torch.ops.lorafx.run_delta_.default(torch.mm(x, weight), x, *bank, rows, kernel)

    def aten() -> None:
        for x, weight, bank, ranges, _ in calls:
            torch.ops.lorafx.add_delta_(torch.mm(x, weight), x, *bank, *ranges, rows)

    return base, {"generated": generated, "aten": aten}


def call_cost() -> float:
    """Microseconds of one call that finds only base rows, its code hot in the caches."""
    spec = DeltaSpec(*(torch.float32,) * 3, 8, RANK, 1, 8, (0,), (0,), (8,))
    kernel = build_all([spec])[spec]
    bank = (torch.zeros(1, RANK, 8), torch.zeros(1, RANK, 8), torch.zeros(1, 1, dtype=torch.int32))
    slots = torch.full((8,), -1, dtype=torch.int32)
    arguments = (torch.zeros(8, 8), torch.zeros(8, 8), *bank, torch.ones(1, 1), slots, 1, kernel)
    times = []
    for _ in range(20):
        start = time.perf_counter()
        for _ in range(1000):
            torch.ops.lorafx.run_delta_.default(*arguments)
        times.append((time.perf_counter() - start) * 1e3)
    return min(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--blocks", type=int, default=20)
    parser.add_argument("--dtype", choices=DTYPES)
    parser.add_argument("--case", choices=ROWS)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = []
    with torch.inference_mode():
        print(f"a call: {call_cost():.1f} µs")
        for dtype in [options.dtype] if options.dtype else DTYPES:
            for case in [options.case] if options.case else ROWS:
                for distinct in (0, 1, 8):
                    base, others = arms(DTYPES[dtype], ROWS[case], distinct)
                    for ratio in compare(base, others, blocks=options.blocks):
                        title = f"{case} {dtype} D={distinct}"
                        print(f"{title:<18} {ratio.arm:<10} {ratio}", flush=True)
                        rows.append(as_row(title, ratio))
    if options.out:
        save(options.out, "LoRA part over the products alone, CPU", rows)


if __name__ == "__main__":
    main()
