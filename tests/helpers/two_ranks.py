"""Runs a function on every rank of a gloo group of small processes, and hands its results back.

The function is `work(rank, size, *args)` of a module that a fresh process can import. What it
returns is pickled; what it raises is raised here.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from waiting import LONG

PRELOADED = ["cheap_captures", "peft", "lorafx.capture.backend", "placed_models", "tensor_parallel"]


def on_ranks(size: int, work: Callable[..., Any], *args: Any) -> list[Any]:
    """The results of `work` by rank.

    Ranks are forked from one clean process that has imported what takes long, so that importing is
    paid for once, not once a rank and test.
    """
    mp.get_context("forkserver").set_forkserver_preload(PRELOADED)
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(
            _rank, (size, folder, work, args), nprocs=size, start_method="forkserver"
        )
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(size)]


def _rank(
    rank: int, size: int, folder: str, work: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=LONG),
    )
    try:
        torch.save(work(rank, size, *args), Path(folder) / f"{rank}.pt")
    finally:
        dist.destroy_process_group()
