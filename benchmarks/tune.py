"""Tiles by measurement: the cost model prunes, a clock decides, the winner is kept on disk.

    tune(spec, strategy, rows) = the tiles with the least timer(tiles) found

From the heuristic's tiles one parameter of one kernel is changed at a time, and a change that is
faster stays, until none is. A candidate is not timed where it cannot run (shared memory, registers)
or where the model says that it takes `SLACK` times as long as the best so far.

The model is tile_cost.py. The timer is a parameter; `gpu_timer` replays a CUDA graph over
20 copies of the weights, so that they come from device memory.
"""

from __future__ import annotations

import functools
import json
import math
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from calibrate import replay_seconds
from tile_cost import TileSet, fits, predicted
from torch import Tensor
from triton.runtime.errors import OutOfResources

import lorafx.kernels.triton.ops  # noqa: F401  registers the op
from lorafx.kernels.cost.chips import Chip, chip_of
from lorafx.kernels.ops.delta_spec import DeltaSpec
from lorafx.kernels.ops.op_library import BankArgs
from lorafx.kernels.triton.build import (
    CONCAT,
    LINEAR,
    TUNED,
    build,
    load_tuned,
    plan_of,
    tiles_for,
    tuned_file,
    tuning_key,
)
from lorafx.kernels.triton.ops import blocks_of, columns_of
from lorafx.kernels.triton.source import TritonSpec
from lorafx.kernels.triton.tiles import Architecture, Tiles, architecture_of

Timer = Callable[[TileSet], float]

SLACK = 2.0  # the model is trusted to be right within this factor

#: What is tried of each parameter, by kernel.
AXES: Mapping[str, Mapping[str, tuple[int, ...]]] = {
    "shrink": {
        "block_r": (16, 32, 64),
        "block_k": (32, 64, 128, 256),
        "parts": (1, 2, 4, 8, 16),
        "num_warps": (2, 4, 8),
        "num_stages": (2, 3, 4, 5),
    },
    "epilogue": {
        "block_n": (16, 32, 64, 128, 256),
        "block_m": (16, 32, 64, 128, 256),
        "block_k": (32, 64, 128, 256),
        "num_stages": (2, 3, 4, 5, 6),
        "num_warps": (2, 4, 8),
        "block_r": (16, 32, 64),
        "group_m": (1, 4, 8),
    },
    "split": {
        "block_n": (32, 64, 128, 256),
        "block_k": (32, 64, 128),
        "split": (1, 2, 4, 8),
        "parts": (2, 4, 8, 16),
        "num_stages": (3, 4, 5, 6),
        "num_warps": (4, 8),
        "lanes": (1, 2, 4, 8),
    },
    "reduce": {
        "block_m": (16, 32, 64),
        "block_n": (32, 64, 128, 256),
        "block_r": (16, 32, 64, 128),
        "at_once": (0, 64),
        "num_warps": (2, 4, 8),
    },
    "expand": {
        "block_n": (32, 64, 128, 256),
        "block_m": (16, 32, 64, 128),
        "num_warps": (2, 4, 8),
        "block_r": (16, 32, 64),
    },
    "gather": {"num_warps": (2, 4, 8)},
    "place": {
        "block_m": (16, 32, 64, 128),
        "block_k": (32, 64, 128),
        "block_r": (16, 32, 64),
        "num_warps": (4, 8),
        "num_stages": (2, 3, 4, 5),
    },
    "shrink_rows": {
        "block_r": (1, 2, 4, 8, 16),
        "block_k": (64, 128, 256, 512, 1024),
        "parts": (1, 2, 4, 8, 16),
        "num_warps": (1, 2, 4),
    },
    "expand_rows": {"block_n": (64, 128, 256, 512, 1024), "num_warps": (1, 2, 4)},
    "embedding_rows": {"block_n": (64, 128, 256, 512, 1024), "num_warps": (1, 2, 4)},
}
SHARED_AXES = ("parts", "split", "ordered")  # what all kernels of a strategy agree on


def neighbours(
    strategy: str, tiles: TileSet, spec: DeltaSpec, arch: Architecture
) -> Iterator[dict[str, Tiles]]:
    """Tiles that differ from `tiles` in one parameter and can run."""
    for name, own in tiles.items():
        for axis, values in AXES[name].items():
            for value in values:
                if value == getattr(own, axis):
                    continue
                change: dict[str, Any] = {axis: value}
                together = tiles if axis in SHARED_AXES else {name: own}
                changed = {n: replace(t, **change) for n, t in together.items()}
                if all(fits(n, t, spec, arch) for n, t in changed.items()):
                    yield {**tiles, **changed}


@dataclass(frozen=True)
class Tuned:
    """What a search found.

    Attributes:
        tiles: of each kernel; seconds: as the timer had them.
        heuristic: seconds of the tiles that it began with.
        timed, pruned: candidates that were timed, and that the model left out.
    """

    tiles: dict[str, Tiles]
    seconds: float
    heuristic: float
    timed: int
    pruned: int


def search(
    strategy: str,
    spec: DeltaSpec,
    rows: int,
    arch: Architecture,
    chip: Chip,
    timer: Timer,
    *,
    most: int = 200,
) -> Tuned:
    """The fastest tiles that changing one parameter at a time leads to, from the heuristic's.

    Args:
        timer: seconds of the strategy with these tiles; infinite where they do not run.
        most: candidates that are timed at most.
    """

    def model(tiles: TileSet) -> float:
        return predicted(strategy, tiles, spec, rows, arch, chip)

    best = tiles_for(strategy, spec, rows, arch)
    least = first = timer(best)
    seen = {_frozen(best)}
    timed, pruned, improved = 1, 0, True
    while improved:
        improved = False
        # Those that the model likes go first, so that what `most` cuts off is what it likes least.
        for tiles in sorted(neighbours(strategy, best, spec, arch), key=model):
            if _frozen(tiles) in seen:
                continue
            seen.add(_frozen(tiles))
            if model(tiles) > SLACK * model(best):
                pruned += 1
                continue
            if timed >= most:
                return Tuned(dict(best), least, first, timed, pruned)
            seconds = timer(tiles)
            timed += 1
            if seconds < least:
                best, least, improved = tiles, seconds, True
                break
    return Tuned(dict(best), least, first, timed, pruned)


def _frozen(tiles: TileSet) -> tuple[tuple[str, Tiles], ...]:
    return tuple(sorted(tiles.items(), key=lambda item: item[0]))


def tune(
    spec: TritonSpec,
    strategy: str,
    rows: int,
    device: torch.device,
    *,
    timer: Timer | None = None,
    most: int = 200,
) -> Tuned:
    """Search the tiles of one node, use them from now on, and keep them on disk.

    Args:
        rows: rows of x; what is found holds up to the next power of two.
        timer: None measures on `device`.
    """
    arch, chip = architecture_of(device), chip_of(device)
    timer = timer or gpu_timer(spec, strategy, rows, device)
    load_tuned(arch)
    key = tuning_key(strategy, arch, spec.delta, rows)
    TUNED.pop(key, None)  # begin with the heuristic's
    found = search(strategy, spec.delta, rows, arch, chip, timer, most=most)
    TUNED[key] = found.tiles
    save_tuned(arch)
    return found


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


def _plain(value: Any) -> Any:
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else value


# --- on a device ---


@dataclass(frozen=True)
class LinearProblem:
    """Random arguments of one node: x (M, K), a weight, a bank of 8 slots that rows share."""

    y: Tensor
    x: Tensor
    weight: Tensor | None
    bias: Tensor | None
    bank: tuple[Tensor, ...]

    @classmethod
    def random(
        cls,
        spec: TritonSpec,
        rows: int,
        device: torch.device,
        *,
        slots: int = 8,
        distinct: int = 8,
        turns: bool | None = None,
    ) -> LinearProblem:
        """Values of about 1 in y, so that no number is denormal or overflows. Rows are of
        `distinct` adapters, spread over the slots; few rows take turns, many come in runs."""
        d = spec.delta
        K, N, R, G = d.in_features, spec.out_features, d.max_rank, d.group

        def normal(*shape: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
            return (torch.randn(shape, device=device) * scale).to(dtype)

        if d.embedding:
            vocabulary = 1024
            x = torch.randint(vocabulary, (rows,), device=device)
            A = normal(slots, vocabulary, R, dtype=d.bank_dtype)
        else:
            x = normal(rows, K, dtype=d.x_dtype)
            A = normal(slots, R, G * K, dtype=d.bank_dtype, scale=K**-0.5)
        B = normal(slots, R, d.columns, dtype=d.bank_dtype, scale=R**-0.5)
        ranks = torch.full((slots, G), R, dtype=torch.int32, device=device)
        scales = torch.ones((slots, G), device=device)
        owners, turns = torch.arange(rows, device=device), rows <= 256 if turns is None else turns
        owners = owners % distinct if turns else owners * distinct // rows
        owners = (owners * (slots // distinct)).to(torch.int32)
        weight = bias = None
        if spec.weight_dtype is not None:
            shape = (K, N) if spec.transposed else (N, K)
            weight = normal(*shape, dtype=spec.weight_dtype, scale=K**-0.5)
            bias = normal(N, dtype=spec.weight_dtype) if spec.bias else None
        y = normal(rows, N, dtype=d.y_dtype)
        return cls(y, x, weight, bias, (A, B, ranks, scales, owners))

    def run(self, strategy: str, kernel: int) -> Tensor:
        """The node's result by `kernel`, one row a request."""
        if strategy in LINEAR:
            return torch.ops.lorafx.triton_linear(
                self.x, self.weight, self.bias, *self.bank, 1, kernel
            )
        if strategy == CONCAT and self.weight is not None:
            base = (self.x, self.weight, self.bias)
            bank, turned = BankArgs(*self.bank), self.weight.shape[0] == self.x.shape[1]
            return concat_linear(*base, bank, 1, kernel, transposed=turned)
        op = torch.ops.lorafx
        name = op.triton_embedding_delta_ if strategy == "embedding" else op.triton_delta_
        name(self.y, self.x, *self.bank, 1, kernel)
        return self.y


def concat_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    bank: BankArgs,
    rows: int,
    kernel: int,
    *,
    transposed: bool = False,
) -> Tensor:
    """y of the strategy "concat"."""
    spec = plan_of(kernel).spec
    more = (0, columns_of(spec, blocks_of(spec, bank)))
    x = torch.nn.functional.pad(x, more)
    right = torch.nn.functional.pad(weight.T if transposed else weight, more).T
    torch.ops.lorafx.triton_concat_(x, right if transposed else right.T, *bank, rows, kernel)
    return x @ right if bias is None else torch.addmm(bias, x, right)


def gpu_timer(
    spec: TritonSpec, strategy: str, rows: int, device: torch.device, *, copies: int = 20
) -> Timer:
    """Seconds of one call: the median of 7 replays of a CUDA graph over `copies` of the weights."""
    problems = [LinearProblem.random(spec, rows, device) for _ in range(copies)]

    def timer(tiles: TileSet) -> float:
        kernel = build(spec, strategy, rows_hint=rows, device=device, tiles=tiles)
        assert kernel is not None
        calls = [functools.partial(problem.run, strategy, kernel) for problem in problems]
        try:
            return replay_seconds(calls, replays=7)
        except OutOfResources:
            return math.inf

    return timer
