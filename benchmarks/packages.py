"""A package of `lorafx.export` beside `lorafx.compile` and `torch.compile`, on a CPU.

The Llama of cpu_mixed.py, rank 16 on all linears, without a cache: 8 requests of one token and of
128, with 0, 1 and 8 distinct adapters. Ratios are times over `torch.compile(model)`.

    python benchmarks/packages.py [--blocks 20] [--out results.json]
"""

from __future__ import annotations

import argparse
import copy
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from cpu_mixed import RANK, TARGETS, build_model, save_adapters
from protocol import rows_of, save

import lorafx

BATCH, LENGTHS, MIXES = 8, (1, 128), (0, 1, 8)


def run(folder: Path, blocks: int) -> list[dict[str, Any]]:
    model = build_model(6, torch.float32)
    paths = save_adapters(model, folder, max(MIXES))
    config = lorafx.LoraConfig(target_modules=TARGETS, max_adapters=max(MIXES), max_rank=RANK)
    example = {"input_ids": torch.randint(3, 4096, (BATCH, 16)), "use_cache": False}
    start = time.perf_counter()
    path = lorafx.export(copy.deepcopy(model), config, example, folder / "model.pt2")
    exported = time.perf_counter() - start
    start = time.perf_counter()
    package = lorafx.load(path)
    rows: list[dict[str, Any]] = [
        {"case": "export", "seconds": exported, "bytes": Path(path).stat().st_size},
        {"case": "load", "seconds": time.perf_counter() - start},
    ]
    print(rows)
    cm = lorafx.compile(copy.deepcopy(model), config, options={"start": "compiled"})
    for name, adapter in paths.items():
        package.load_adapter(adapter, name)
        cm.load_adapter(adapter, name)
    base = torch.compile(model)
    for length in LENGTHS:
        ids = torch.randint(3, 4096, (BATCH, length))
        arms: dict[str, Callable[[], Any]] = {}
        for distinct in MIXES:
            names: Sequence[str | None] = [
                list(paths)[row % distinct] if distinct else None for row in range(BATCH)
            ]
            named: Any = {"adapter_names": names}
            arms[f"package, D={distinct}"] = lambda named=named, ids=ids: package(ids, **named)
            arms[f"lorafx.compile, D={distinct}"] = lambda named=named, ids=ids: cm(
                input_ids=ids, use_cache=False, **named
            )
        label = f"{BATCH} requests of {length} tokens"

        def plain(ids: torch.Tensor = ids) -> Any:
            return base(input_ids=ids, use_cache=False)

        rows += rows_of(label, plain, arms, blocks=blocks, seconds=0.1)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--blocks", type=int, default=20)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        rows = run(Path(folder), options.blocks)
    if options.out is not None:
        save(options.out, "packages beside compiled models, on a CPU", rows)


if __name__ == "__main__":
    main()
