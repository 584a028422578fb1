"""Time of `warmup()` beside that of one graph, with graphs of the base's own and without.

Each start is a process of its own with empty caches that builds the random Llama of
compile_time.py, loads an adapter of rank 16 and compiles. "one graph" is a mixed call of `forward`;
the others are calls of `warmup`, with the default of `Options.base_graphs` and with graphs of the
base's own. Seconds of wall time, CPU seconds of the process and of the compilers that it starts,
and of each graph the seconds of each part. Some six minutes on two cores.

    python benchmarks/warm_up.py [--depth N] [--out FILE]
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from compile_time import spent
from compile_time import start as start_llama
from protocol import in_process, save

#: What is run: arguments of `warmup`, None for one mixed call; and `Options.base_graphs`.
ARMS: dict[str, tuple[dict[str, Any] | None, bool | str]] = {
    "one graph": (None, "auto"),
    "all": ({}, "auto"),
    "generate, several requests": ({"generate": True, "batch_sizes": (4,)}, "auto"),
    "generate, several requests, graphs of the base": (
        {"generate": True, "batch_sizes": (4,)},
        True,
    ),
}


def start(arm: str, layers: int) -> dict[str, Any]:
    """One start of this process."""
    import torch

    asked, base_graphs = ARMS[arm]
    cm, _ = start_llama("llama", layers, True, True, base_graphs=base_graphs)
    ids = torch.randint(0, cm._orig_mod.config.vocab_size, (4, 5))

    def call() -> None:
        if asked is None:
            cm(input_ids=ids, use_cache=False, adapter_names=["a", None] * 2)
        else:
            cm.warmup(**asked)

    return {
        **spent(call),
        "graphs": cm.recompiles,
        "each": [
            {"title": graph.title, "reason": graph.reason, **graph.seconds}
            for graph in cm.explain().graphs
        ],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--depth", type=int, action="append", help="layers; 32 without it")
    parser.add_argument("--arm", choices=ARMS, action="append")
    parser.add_argument("--out", default="benchmarks/results/warm_up.json")
    options = parser.parse_args()
    rows = []
    for layers in options.depth or [32]:
        for arm in options.arm or ARMS:
            with tempfile.TemporaryDirectory() as folder:
                row = in_process(__file__, "start", arm, layers, cache=Path(folder))
            rows.append({"case": arm, "layers": layers, **row})
            print(
                f"{layers:3d} layers, {arm}: {row['graphs']} graphs, {row['seconds']:.1f} s "
                f"(cpu {row['cpu']:.1f}, compilers {row['compilers']:.1f})",
                flush=True,
            )
    save(Path(options.out), "warmup of a Llama of hidden 512 beside one graph", rows)


if __name__ == "__main__":
    main()
