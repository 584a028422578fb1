"""Products of few rows with a dense weight on a CPU: the generated kernel beside torch.mm.

The linears of a Llama (hidden 1024, intermediate 2816, a vocabulary of 32000), each with so many
copies of its weight that they come from memory. Time of lorafx::weight_mm over torch.mm in the same
run, and the rates at which both read W:

    python benchmarks/dense_rows.py [--rows 1 8 16] [--dtype fp32|bf16|fp16] [--threads 2] [--quick]
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path
from typing import Any

import torch
from protocol import rows_of, save

from lorafx.kernels.cpu.weight_mm import ready
from lorafx.kernels.cpu.weight_source import WeightSpec

SHAPES = {"o": (1024, 1024), "up": (2816, 1024), "down": (1024, 2816), "head": (32000, 1024)}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
ROWS = (1, 2, 4, 8, 16, 32, 64, 128)
#: Bytes of all copies of a weight: several times the largest cache.
COPIES = 160 << 20


def measured(
    title: str, rows: int, N: int, K: int, dtype: torch.dtype, blocks: int
) -> list[dict[str, Any]]:
    """Rows of results over torch.mm, with the rates at which W is read."""
    x = torch.randn(rows, K).to(dtype)
    size = N * K * dtype.itemsize
    weights = [torch.randn(N, K).to(dtype) for _ in range(max(2, COPIES // size))]
    by_mm, by_kernel = itertools.cycle(weights), itertools.cycle(weights)

    def library() -> None:
        torch.mm(x, next(by_mm).T)

    def generated() -> None:
        torch.ops.lorafx.weight_mm.default(x, next(by_kernel))

    arms = {"generated": generated}
    found = rows_of(title, library, arms, blocks=blocks, seconds=0.05)
    return [row | {"gigabytes_per_second": size / row["milliseconds"] / 1e6} for row in found]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS)
    parser.add_argument("--dtype", choices=DTYPES)
    parser.add_argument("--shape", choices=SHAPES)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--quick", action="store_true", help="5 blocks; nothing saved")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/dense_rows.json"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    found: list[dict[str, Any]] = []
    with torch.inference_mode():
        for name in [options.dtype] if options.dtype else DTYPES:
            dtype = DTYPES[name]
            ready(WeightSpec(dtype, dtype))
            for shape in [options.shape] if options.shape else SHAPES:
                for rows in options.rows:
                    title = f"{name} {shape} {rows} rows, {options.threads} threads"
                    blocks = 5 if options.quick else 20
                    found += measured(title, rows, *SHAPES[shape], dtype, blocks)
    if not options.quick:
        save(options.out, "generated product over torch.mm, cold weights, CPU", found)


if __name__ == "__main__":
    main()
