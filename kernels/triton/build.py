"""Generated Triton kernels: from a spec and a strategy to an id that the Triton ops understand.

    build(spec, strategy, rows_hint, device) = id, a hash of the kernels' sources and tiles

    split      x Wᵀ in parts of K and beside it the shrink, then the parts added up with v B
    epilogue   shrink, then x Wᵀ + b with v B added in its epilogue; y is written once
    recompute  one kernel: each tile computes v for its own rows beside x Wᵀ
    segments   shrink, then y += v B, rows sorted by slot; the base product is the vendor's
    concat     v behind the columns of x and B behind those of W, then the vendor's GEMM of both
    gemv       as "segments" a row at a time, for one or two rows an adapter
    embedding  y += A[s, id] B[s]
    grouped    "epilogue" for rows sorted by expert, each with its expert's W, A and B
    activated  the same with x = f(…) computed by the shrink, which writes it down for the product

The id is the same in every process that has the same templates, tiles and versions, so a graph
cached on disk stays valid; a process must call `build` before it runs such a graph.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from lorafx.errors import LoweringError
from lorafx.kernels.ops.delta_spec import DeltaSpec
from lorafx.kernels.triton.generated import GeneratedKernel, load
from lorafx.kernels.triton.source import COLUMN_UNIT, TritonSpec
from lorafx.kernels.triton.strategy_tiles import STRATEGY_KERNELS, load_tuned, tiles_for
from lorafx.kernels.triton.tiles import Architecture, Tiles, architecture_of

#: Strategies of `lorafx::triton_linear`, which compute the base product too.
LINEAR = ("split", "epilogue", "recompute")
#: Strategies of `lorafx::triton_experts`, likewise.
EXPERTS = ("grouped", "activated")
#: The strategy that makes x and W longer for the vendor's GEMM (concat_ops.py).
CONCAT = "concat"
#: Strategies of the deltas alone.
DELTA = ("segments", "gemv", "embedding")
#: One program of the sorting kernel ranks this many requests.
ORDER_TILES = Tiles(block_m=64, num_stages=1)


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
        rows_hint: rows of x to choose tiles for, at least 1, of one expert where there are several;
            the kernels are right for any number.
        device: where they will run; a CPU means Triton's interpreter.
        tiles: of each kernel of the strategy, instead of the heuristic's or the tuner's.

    Returns None where no kernels are generated (float64, empty ranges). Raises LoweringError for an
    unknown strategy, a strategy that cannot compute the node, or a file that cannot be written.
    """
    if strategy not in STRATEGY_KERNELS:
        known = ", ".join(STRATEGY_KERNELS)
        raise LoweringError(f"no Triton strategy {strategy!r}; there are {known}")
    if strategy in (*LINEAR, *EXPERTS) and spec.weight_dtype is None:
        raise LoweringError(f"strategy {strategy!r} computes the base product: name its weight")
    if (strategy in EXPERTS) != (spec.experts > 0 and strategy not in DELTA):
        raise LoweringError(f"strategy {strategy!r} does not serve {spec.experts} experts")
    if strategy == "activated" and spec.activation is None:
        raise LoweringError(f"strategy {strategy!r} computes x itself and needs the activation")
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
    """`spec` without what kernels of `strategy` do not depend on: one kernel for all such bases."""
    if strategy in DELTA:
        return TritonSpec(spec.delta)
    if strategy == CONCAT:
        return TritonSpec(spec.delta, transposed=spec.transposed, by_request=spec.by_request)
    activation = spec.activation if strategy == "activated" else None
    return replace(spec, by_request=False, activation=activation)


def _plan(
    spec: TritonSpec, strategy: str, tiles: Mapping[str, Tiles], arch: Architecture
) -> LaunchPlan:
    names = STRATEGY_KERNELS[strategy]
    if set(tiles) != set(names):
        raise LoweringError(f"strategy {strategy!r} has the kernels {names}, not {tuple(tiles)}")
    if len({(own.parts, own.split, own.ordered) for own in tiles.values()}) > 1:
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
