"""Products of a decode step on a CPU, with their deltas, as shares of the memory's read speed.

The 24 packed products of a Llama (hidden 1024, intermediate 2816, 6 layers), each
with a weight and a bank of its own, which the caches do not hold; 1 and 8 rows with 0, 1 and 8
adapters of rank 16. The base arm reads as many bytes of memory as the weights have, by a loop that
only reads, on as many threads. Share = time of reading / time of the step.

    python benchmarks/read_share.py [--dtype fp32|bf16] [--out FILE] [--quick]

ATEN_CPU_CAPABILITY=avx2 has lorafx generate kernels for AVX2 alone, and torch run its own.
"""

from __future__ import annotations

import argparse
import ctypes
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from protocol import as_row, compare, machine, save
from triton_variants import packed_delta

from lorafx.kernels.cpu import compiler
from lorafx.kernels.cpu.delta_kernels import build_all
from lorafx.kernels.cpu.weight_mm import ready
from lorafx.kernels.cpu.weight_source import WeightSpec

LAYERS, RANK = 6, 16
PACKS = {"qkv": (1024, (1024,) * 3), "o": (1024, (1024,)), "gate_up": (1024, (2816,) * 2)}
PACKS["down"] = (2816, (1024,))
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
CASES = ((1, 0), (1, 1), (8, 0), (8, 1), (8, 8))
#: Several streams, since one alone is limited by the latency of its cache lines.
READER = """
extern "C" long read_all(const long* data, long count) {
    long sums[8] = {};
    const long part = count / 8;
    for (long i = 0; i + 8 <= part; i += 8)
        for (int stream = 0; stream < 8; ++stream)
            for (int j = 0; j < 8; ++j) sums[j] ^= data[stream * part + i + j];
    return sums[0] ^ sums[1] ^ sums[2] ^ sums[3] ^ sums[4] ^ sums[5] ^ sums[6] ^ sums[7];
}
"""
Step = Callable[[], object]


def reader(count: int) -> Step:
    """Reads `count` bytes on all threads, of a buffer that no cache holds."""
    flags = compiler.best_isa().flags
    read = compiler.load_library(compiler.compile_library(READER, flags)).read_all
    read.argtypes, read.restype = (ctypes.c_void_p, ctypes.c_long), ctypes.c_long
    threads, buffer = torch.get_num_threads(), torch.ones(count // 8, dtype=torch.long)
    shares = buffer.chunk(threads)
    pool = ThreadPoolExecutor(threads)
    return lambda: list(pool.map(lambda share: read(share.data_ptr(), share.numel()), shares))


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


def steps(dtype: torch.dtype, rows: int) -> tuple[int, dict[str, Step]]:
    """(bytes of all weights, a step of `rows` rows for each number of adapters)."""
    specs = {name: packed_delta(K, sizes, RANK, dtype) for name, (K, sizes) in PACKS.items()}
    kernels = build_all(specs.values())
    calls = []
    for name in list(PACKS) * LAYERS:
        K, sizes = PACKS[name]
        bank, weight = bank_of(name, rows, dtype), torch.randn(sum(sizes), K).to(dtype)
        calls.append((torch.randn(rows, K).to(dtype), weight, bank, kernels[specs[name]]))

    def step(distinct: int) -> Step:
        owners = [j % distinct if distinct else -1 for j in range(rows)]
        slots = torch.tensor(owners, dtype=torch.int32)

        def run() -> None:
            for x, weight, bank, kernel in calls:
                torch.ops.lorafx.weight_mm_delta.default(x, weight, *bank, slots, 1, kernel)

        return run

    distinct = [adapters for count, adapters in CASES if count == rows]
    size = sum(weight.nbytes for _, weight, *_ in calls)
    return size, {f"{rows} rows, {count} adapters": step(count) for count in distinct}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dtype", choices=DTYPES)
    parser.add_argument("--quick", action="store_true", help="3 blocks; nothing saved")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/read_share.json"))
    options = parser.parse_args()
    isa, found = compiler.best_isa().name, []
    with torch.inference_mode():
        for name in [options.dtype] if options.dtype else DTYPES:
            assert ready(WeightSpec(DTYPES[name], DTYPES[name]))
            for rows in dict.fromkeys(rows for rows, _ in CASES):
                size, arms = steps(DTYPES[name], rows)
                blocks = 3 if options.quick else 20
                for ratio in compare(reader(size), arms, blocks=blocks, seconds=0.05):
                    low, share, high = (1 / r for r in (ratio.high, ratio.median, ratio.low))
                    title, rate = f"{name}, {isa}", size / ratio.milliseconds / 1e6
                    print(f"{title}: {ratio.arm:<22} {share:.2f} [{low:.2f}, {high:.2f}]", end=" ")
                    print(f"{ratio.milliseconds:6.2f} ms {rate:5.1f} GB/s", flush=True)
                    found.append(as_row(title, ratio) | {"share": share, "gigabytes": rate})
    if not options.quick:
        title = "time of a step's products over reading their weights from memory, CPU"
        save(options.out, title, found, lambda: machine() | {"isa": isa})


if __name__ == "__main__":
    main()
