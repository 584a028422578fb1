"""Generated Triton kernels: from a spec and a strategy to an id that the Triton ops understand.

    build(spec, strategy, rows_hint, device) = id, a hash of the kernels' sources and tiles

docs/kernels.md explains the strategies. The id is the same in every process that has the same
templates, tiles and versions, so a graph cached on disk stays valid; a process must call `build`
before it runs such a graph. Tuned tiles are kept in lorafx's cache folder, a file for each
architecture and set of versions.
"""

from __future__ import annotations

import functools
import hashlib
import json
import threading
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from lorafx.errors import LorafxWarning, LoweringError
from lorafx.kernels.cpu.compiler import cache_folder
from lorafx.kernels.ops.delta_spec import DeltaSpec
from lorafx.kernels.triton.generated import GeneratedKernel, load
from lorafx.kernels.triton.source import COLUMN_UNIT, TritonSpec, generator_hash
from lorafx.kernels.triton.tiles import (
    Architecture,
    Tiles,
    architecture_of,
    concat_tiles,
    expand_rows_tiles,
    linear_tiles,
    power_of_two,
    shrink_rows_tiles,
    shrink_tiles,
    split_tiles,
)
from lorafx.torch_internals import triton_compat

#: Strategies of `lorafx::triton_linear`, which compute the base product too.
LINEAR = ("split", "epilogue")
#: The strategy that makes x and W longer for the vendor's GEMM (ops.py).
CONCAT = "concat"
#: Strategies of the deltas alone.
DELTA = ("segments", "gemv", "embedding")
#: One program of the sorting kernel ranks this many requests.
ORDER_TILES = Tiles(block_m=64, num_stages=1)


# strategy -> the kernels that it launches, in order
STRATEGY_KERNELS: Mapping[str, tuple[str, ...]] = {
    "split": ("split", "reduce"),
    "epilogue": ("shrink", "epilogue"),
    "segments": ("shrink", "expand"),
    "concat": ("gather", "place"),
    "gemv": ("shrink_rows", "expand_rows"),
    "embedding": ("embedding_rows",),
}


@dataclass(frozen=True, eq=False)
class LaunchPlan:
    """The kernels of an id in the order of launching, and the sorting kernel if rows are sorted."""

    id: int
    strategy: str
    spec: TritonSpec
    kernels: Mapping[str, GeneratedKernel]
    order: GeneratedKernel | None = None

    @property
    def all_kernels(self) -> tuple[GeneratedKernel, ...]:
        return (*(() if self.order is None else (self.order,)), *self.kernels.values())


_LOCK = threading.RLock()
_PLANS: dict[int, LaunchPlan] = {}
_BUILT: dict[tuple[TritonSpec, str, Architecture, tuple[tuple[str, Tiles], ...]], int] = {}


def build(
    spec: TritonSpec,
    strategy: str,
    *,
    rows_hint: int,
    device: torch.device,
    tiles: Mapping[str, Tiles] | None = None,
) -> int | None:
    """The id of the kernels of `spec`, generated if need be and known to this process.

    Args:
        rows_hint: rows of x to choose tiles for, at least 1; the kernels are right for any number.
        device: where they will run; a CPU means Triton's interpreter.
        tiles: of each kernel of the strategy, instead of the heuristic's or the tuner's.

    Returns None where no kernels are generated (float64, empty ranges). Raises LoweringError for an
    unknown strategy, a strategy that cannot compute the node, or a file that cannot be written.
    """
    if strategy not in STRATEGY_KERNELS:
        known = ", ".join(STRATEGY_KERNELS)
        raise LoweringError(f"no Triton strategy {strategy!r}; there are {known}")
    if strategy in LINEAR and spec.weight_dtype is None:
        raise LoweringError(f"strategy {strategy!r} computes the base product: name its weight")
    if not spec.supported() or spec.delta.embedding != (strategy == "embedding"):
        return None
    if strategy == CONCAT and (why := not_concat(spec.delta, spec.weight_dtype)):
        raise LoweringError(f"strategy {strategy!r} cannot make x and W longer: {why}")
    spec = spec_for(strategy, spec)
    arch = architecture_of(device)
    load_tuned(arch)
    chosen = dict(tiles) if tiles is not None else tiles_for(strategy, spec.delta, rows_hint, arch)
    key = (spec, strategy, arch, tuple(chosen.items()))
    with _LOCK:
        if key not in _BUILT:
            plan = _plan(spec, strategy, chosen, arch)
            _PLANS[plan.id] = plan
            _BUILT[key] = plan.id
        return _BUILT[key]


def not_concat(delta: DeltaSpec, weight_dtype: torch.dtype | None) -> str:
    """Why x and W cannot be made longer; "" where they can."""
    dtypes = {delta.x_dtype, delta.bank_dtype, delta.y_dtype, weight_dtype}
    if len(dtypes) != 1:
        return "x, W, the bank and y are not of one type"
    if delta.x_dtype == torch.float16:
        return "x A may overflow float16"
    if delta.in_features % COLUMN_UNIT:
        return f"K is {delta.in_features}, not a multiple of {COLUMN_UNIT}"
    return ""


def spec_for(strategy: str, spec: TritonSpec) -> TritonSpec:
    """`spec` without the fields that kernels of `strategy` do not depend on."""
    if strategy in DELTA:
        return TritonSpec(spec.delta)
    if strategy == CONCAT:
        return TritonSpec(spec.delta, transposed=spec.transposed, by_request=spec.by_request)
    return replace(spec, by_request=False)


def _plan(
    spec: TritonSpec, strategy: str, tiles: Mapping[str, Tiles], arch: Architecture
) -> LaunchPlan:
    names = STRATEGY_KERNELS[strategy]
    if set(tiles) != set(names):
        raise LoweringError(f"strategy {strategy!r} has the kernels {names}, not {tuple(tiles)}")
    if len({(tile.parts, tile.split, tile.ordered) for tile in tiles.values()}) > 1:
        raise LoweringError(f"kernels of strategy {strategy!r} disagree on parts, split or ordered")
    kernels = {name: load(name, spec, tiles[name], arch) for name in names}
    order = load("order", None, ORDER_TILES, arch) if tiles[names[0]].ordered else None
    keys = [kernel.key for kernel in kernels.values()]
    digest = hashlib.sha256("\0".join((strategy, *keys)).encode()).digest()
    return LaunchPlan(int.from_bytes(digest[:7], "big") + 1, strategy, spec, kernels, order)


def plan_of(kernel: int) -> LaunchPlan:
    plan = _PLANS.get(kernel)
    if plan is None:
        raise LoweringError(
            f"Triton kernel {kernel} is not loaded in this process; build it with"
            " lorafx.kernels.triton.build.build before the graph runs"
        )
    return plan


def source_of(kernel: int) -> str:
    texts = [f"# {k.path.name}\n{k.text}" for k in plan_of(kernel).all_kernels]
    return "\n\n".join(texts)


# What a tuner measured: (strategy, architecture, spec, M rounded up to a power of two) -> tiles
Key = tuple[str, str, DeltaSpec, int]
TUNED: dict[Key, dict[str, Tiles]] = {}


def tuning_key(strategy: str, arch: Architecture, spec: DeltaSpec, rows: int) -> Key:
    return strategy, arch.name, spec, power_of_two(rows, 1, 1 << 20)


def tiles_for(strategy: str, spec: DeltaSpec, rows: int, arch: Architecture) -> dict[str, Tiles]:
    """Tiles of each kernel of `strategy` for about `rows` rows, tuned or the heuristic's."""
    rows = max(rows, 1)
    tuned = TUNED.get(tuning_key(strategy, arch, spec, rows))
    if tuned is not None:
        return dict(tuned)
    if strategy == "embedding":
        return {"embedding_rows": expand_rows_tiles(spec, arch)}
    if strategy == "gemv":
        first = shrink_rows_tiles(spec, rows, arch)
        second = expand_rows_tiles(spec, arch)
        pair = {"shrink_rows": first, "expand_rows": replace(second, parts=first.parts)}
        return {name: replace(t, overlap=arch.overlaps) for name, t in pair.items()}
    if strategy == CONCAT:
        return concat_tiles(spec, rows, arch)
    if strategy == "split":
        return split_tiles(spec, rows, arch)
    first = shrink_tiles(spec, rows, arch)
    ordered = strategy == "segments" and rows > first.block_m
    first = replace(first, ordered=ordered, overlap=arch.overlaps)
    name, reader = STRATEGY_KERNELS[strategy]
    second = linear_tiles(spec, rows, arch, reader)
    second = replace(second, parts=first.parts, ordered=ordered, overlap=arch.overlaps)
    return {name: first, reader: second}


def tuned_file(arch: Architecture) -> Path:
    versions = f"triton{triton_compat.version()}-torch{torch.__version__}-{generator_hash()[:8]}"
    return cache_folder() / "tuned" / f"{arch.name}-{arch.processors}-{versions}.json"


@functools.cache
def load_tuned(arch: Architecture) -> int:
    path = tuned_file(arch)
    if not path.exists():
        return 0
    try:
        rows = [_winner(row) for row in json.loads(path.read_text())]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        warnings.warn(
            f"{path} is damaged, or of another version's fields ({error!r}); kernels have the "
            "heuristic's tiles, which are right too. Delete the file, or tune anew",
            LorafxWarning,
            stacklevel=2,
        )
        return 0
    for (strategy, spec, bucket), tiles in rows:
        TUNED.setdefault((strategy, arch.name, spec, bucket), tiles)
    return len(rows)


def _winner(row: Any) -> tuple[tuple[str, DeltaSpec, int], dict[str, Tiles]]:
    spec = DeltaSpec(**{k: _typed(k, v) for k, v in row["spec"].items()})
    tiles = {name: Tiles(**fields) for name, fields in row["tiles"].items()}
    return (row["strategy"], spec, row["rows"]), tiles


def _typed(name: str, value: Any) -> Any:
    if name.endswith("dtype"):
        return getattr(torch, value)
    return tuple(value) if isinstance(value, list) else value
