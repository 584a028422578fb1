"""Tuned tiles on disk: one file an architecture and set of versions, in lorafx's cache folder.

load_tuned(arch)   file → kernels.triton.strategy_tiles.TUNED, once a process
save_tuned(arch)   TUNED → file
"""

from __future__ import annotations

import functools
import json
import os
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from lorafx.kernels.cpu.compiler import cache_folder
from lorafx.kernels.ops.delta_spec import DeltaSpec
from lorafx.kernels.triton.strategy_tiles import TUNED
from lorafx.kernels.triton.triton_source import generator_hash
from lorafx.kernels.triton.triton_tiles import Architecture, Tiles
from lorafx.torch_internals import triton_compat


def tuned_file(arch: Architecture) -> Path:
    """Where the winners of `arch` are kept: other versions or templates have other winners."""
    versions = f"triton{triton_compat.version()}-torch{torch.__version__}-{generator_hash()[:8]}"
    return cache_folder() / "tuned" / f"{arch.name}-{arch.processors}-{versions}.json"


def save_tuned(arch: Architecture) -> Path:
    """Write every winner of `arch` that this process has; the file is renamed into place."""
    path = tuned_file(arch)
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [
        {
            "strategy": strategy,
            "rows": bucket,
            "spec": {k: _plain(v) for k, v in asdict(spec).items()},
            "tiles": {name: asdict(own) for name, own in tiles.items()},
        }
        for (strategy, name, spec, bucket), tiles in TUNED.items()
        if name == arch.name
    ]
    with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", delete=False) as scratch:
        json.dump(rows, scratch, indent=1)
    os.replace(scratch.name, path)
    return path


@functools.cache
def load_tuned(arch: Architecture) -> int:
    """Bring the winners that are on disk for `arch` into `TUNED`, once; how many there are."""
    path = tuned_file(arch)
    if not path.exists():
        return 0
    try:
        rows = [_winner(row) for row in json.loads(path.read_text())]
    except (ValueError, TypeError, KeyError, AttributeError):
        return 0  # damaged, or of other fields than today's: the heuristic's tiles are right too
    for (strategy, spec, bucket), tiles in rows:
        TUNED.setdefault((strategy, arch.name, spec, bucket), tiles)
    return len(rows)


def _winner(row: Any) -> tuple[tuple[str, DeltaSpec, int], dict[str, Tiles]]:
    spec = DeltaSpec(**{k: _typed(k, v) for k, v in row["spec"].items()})
    tiles = {name: Tiles(**own) for name, own in row["tiles"].items()}
    return (row["strategy"], spec, row["rows"]), tiles


def _plain(value: Any) -> Any:
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else value


def _typed(name: str, value: Any) -> Any:
    if name.endswith("dtype"):
        return getattr(torch, value)
    return tuple(value) if isinstance(value, list) else value
