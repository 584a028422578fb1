"""Time of matching and of attaching by the number of modules, on the meta device.

    match    module graph, registry and targets: which modules are sites
    attach   a bank for each group of siblings, a mark on each site
    all      lorafx.attach: both, the store, what graphs will ask about the model

Models are decoder layers of 13 modules, 7 of them linears. Every figure is the best of some fresh
attempts, in seconds: wall time, and CPU time of the process, which other work on the machine does
not stretch as much. `over linear` is the growth of the CPU time over that of the modules, from the
next smaller model.

    python benchmarks/attach.py [--sizes 1000,10000] [--attempts 3] [--out results.json]
"""

from __future__ import annotations

import argparse
import gc
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from protocol import machine, save
from torch import nn
from transformers import LlamaConfig, LlamaModel

import lorafx
from lorafx.config import LoraConfig
from lorafx.model_passes import run_model_passes
from lorafx.passes.alias import Alias
from lorafx.passes.attach import Attach
from lorafx.passes.select import Select
from lorafx.program.program import Preparation
from lorafx.progress import progress
from lorafx.runtime.marking import build_sites

SIZES = (1_000, 10_000, 100_000)


def build(modules: int) -> nn.Module:
    """A Llama of about that many modules, on the meta device."""
    sizes = {"hidden_size": 64, "intermediate_size": 192, "vocab_size": 1000}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    with torch.device("meta"):
        config = LlamaConfig(**sizes, **heads, num_hidden_layers=(modules - 5) // 13)
        return LlamaModel(config).eval()


def targets(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Ways to name the linears of every layer, or two of them."""
    yield "all linears", None
    yield "list of two suffixes", ["q_proj", "v_proj"]
    yield "regular expression", r".*\.(q|v)_proj"
    yield "list of all paths", [p for p, m in model.named_modules() if isinstance(m, nn.Linear)]
    # As an adapter names them that was saved from a model with one wrapper less.
    yield (
        "list of shorter paths",
        [
            path.removeprefix("layers.")
            for path, module in model.named_modules()
            if path.endswith("proj")
        ],
    )


def timed(work: Callable[[], Any]) -> tuple[Any, float, float]:
    """What `work` returns, its wall time and its CPU time."""
    gc.collect()
    wall, cpu = time.perf_counter(), time.process_time()
    result = work()
    return result, time.perf_counter() - wall, time.process_time() - cpu


def attempt(model: nn.Module, config: LoraConfig) -> dict[str, tuple[float, float]]:
    """(wall, CPU) seconds of each step; the model is as before afterwards."""
    prepared = Preparation(model, config)
    _, *match = timed(lambda: run_model_passes(prepared, (Alias(), Select())))
    _, *attach = timed(lambda: run_model_passes(prepared, (Attach(),)))
    prepared.rollback.run()
    _, *everything = timed(lambda: lorafx.attach(model, config))
    lorafx.detach(model)
    return {"match": tuple(match), "attach": tuple(attach), "all": tuple(everything)}


def measure(model: nn.Module, target: Any, attempts: int) -> dict[str, Any]:
    """Best wall and CPU seconds of each step, and the number of sites."""
    config = LoraConfig(target_modules=target, max_adapters=4, max_rank=16)
    runs = [attempt(model, config) for _ in range(attempts)]
    row: dict[str, Any] = {"sites": len(build_sites(model, config)[1])}
    for step in runs[0]:
        row[step] = round(min(run[step][0] for run in runs), 4)
        row[f"{step}, CPU"] = round(min(run[step][1] for run in runs), 4)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", default=",".join(map(str, SIZES)), help="modules, ascending")
    parser.add_argument("--attempts", type=int, default=3)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    load = round(os.getloadavg()[0], 1)
    rows: list[dict[str, Any]] = []
    smaller: dict[str, tuple[int, float]] = {}
    for size in map(int, options.sizes.split(",")):
        with progress(f"building {size} modules"):
            model = build(size)
        count = sum(1 for _ in model.modules())
        for name, target in targets(model):
            with progress(f"{name} in {count} modules"):
                row = {
                    "modules": count,
                    "targets": name,
                    **measure(model, target, options.attempts),
                }
            cpu = row["all, CPU"]
            if name in smaller:
                modules, before = smaller[name]
                row["over linear"] = round(cpu / before / (count / modules), 2)
            smaller[name] = (count, cpu)
            rows.append(row)
            print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
            if options.out is not None:  # what was measured stays if the run is cut short
                title = f"matching and attaching, best of {options.attempts}, seconds"
                save(options.out, title, rows, lambda: {**machine(), "load before": load})


if __name__ == "__main__":
    main()
