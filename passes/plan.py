"""Choose how each LoRA node is computed.

    inductor   on a CPU generated C++, else plain aten; a pack's base product is one GEMM, or one
               per sibling if that is faster
    triton     the strategy with the least modelled time (lorafx.kernels.cost.roofline) for the rows
               that the graph was captured with, by generated Triton kernels
    reference  plain aten

The choice is data on the node. Users pin it by site path (`Options.plan`), `lower` carries it out,
and `explain` prints it with the node's byte floor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import fx

from lorafx.errors import ConfigError
from lorafx.kernels.cost.chips import chip_of
from lorafx.kernels.cost.roofline import (
    FUSED,
    Work,
    byte_floor,
    estimate,
    split_is_faster,
    work_of,
)
from lorafx.kernels.cpu.delta_kernels import build_all
from lorafx.kernels.triton.build import CONCAT, not_concat
from lorafx.kernels.triton.build import build as build_triton
from lorafx.kernels.triton.ops import adjacent
from lorafx.model.bank import Bank
from lorafx.model.sites import Part, Site
from lorafx.op_arguments import bound
from lorafx.program.context import EMBEDDING_OP, FUSED_OP, PLAIN_SITE_OPS, Context
from lorafx.program.frame import fake_value
from lorafx.program.strategies import (
    ATEN,
    GENERATED,
    Strategy,
    choose,
    cpu_spec,
    delta_spec,
    triton_spec,
)
from lorafx.torch_internals.compat import size_hint


@dataclass(frozen=True)
class Plan:
    """The strategy of each node: generated code or plain aten."""

    name: str = "plan"
    required: bool = False

    def run(self, gm: fx.GraphModule, ctx: Context) -> int:
        planners = {"triton": _plan_triton, "inductor": _plan_cpu}
        planner = planners.get(ctx.program.options.lowering, _plan_aten)
        plain = [node for node in ctx.states if node.target in PLAIN_SITE_OPS]
        planner(ctx, [node for node in ctx.states if node.target not in PLAIN_SITE_OPS])
        _plan_aten(ctx, plain)
        return len(ctx.states)


def _plan_aten(ctx: Context, nodes: Sequence[fx.Node]) -> None:
    for node in nodes:
        choose(ctx, node, Strategy(ATEN, reason=_floor(ctx, node)))


def _plan_cpu(ctx: Context, nodes: Sequence[fx.Node]) -> None:
    defaults = {n: GENERATED if fake_value(n).device.type == "cpu" else ATEN for n in nodes}
    names = {node: _pinned(ctx, node) or name for node, name in defaults.items()}
    specs = {node: cpu_spec(node) for node, name in names.items() if name == GENERATED}
    kernels = build_all(specs.values())
    for node in nodes:
        built = node in specs and kernels[specs[node]] is not None
        reason = _floor(ctx, node)
        if node in specs and not built:
            reason += "; no kernel could be generated"
        name = GENERATED if built else ATEN
        choose(ctx, node, Strategy(name, split=_splits_product(node), reason=reason))


def _plan_triton(ctx: Context, nodes: Sequence[fx.Node]) -> None:
    for node in nodes:
        name, reason = _triton_choice(ctx, node)
        kernel = None
        if name != ATEN:
            hints = {"rows_hint": _rows(node) or UNKNOWN_ROWS, "device": fake_value(node).device}
            kernel = build_triton(triton_spec(node), name, **hints)
        if kernel is None:
            name = ATEN
            reason = f"{reason}; no kernel could be generated" if reason else ""
        choose(ctx, node, Strategy(name, kernel=kernel or 0, reason=reason))


#: The assumed number of rows if it depends on data.
UNKNOWN_ROWS = 4096
#: The only strategy of an embedding's delta.
EMBEDDING = "embedding"


def _triton_choice(ctx: Context, node: fx.Node) -> tuple[str, str]:
    """The strategy and its reason. Raises ConfigError if the pinned one cannot compute the node."""
    pinned, proved = _pinned(ctx, node), bound(node)["rows"]
    if isinstance(proved, int) and proved == 0:
        return ATEN, "row ownership was not analysed, and only aten can refuse a mixed batch"
    if pinned is not None:
        if unfit := _unfit(node, pinned):
            paths = ", ".join(_paths(ctx, node))
            raise ConfigError(f"Options.plan pins {pinned!r} for {paths}{unfit}")
        return pinned, f"pinned; {_floor(ctx, node)}"
    if node.target is EMBEDDING_OP:
        return EMBEDDING, "rows are gathered one by one"
    work = _work(ctx, node)
    estimates = {} if work is None else estimate(work)
    for name, modelled in estimates.items():
        if name == CONCAT and _not_concat(node):
            continue
        if not modelled.refusal and (name not in FUSED or _fusable(node)):
            return name, f"modelled {modelled} at {_rows(node)} rows; {_floor(ctx, node)}"
    return "segments", f"the number of rows is unknown; {_floor(ctx, node)}"


def _unfit(node: fx.Node, name: str) -> str:
    """Why a pinned strategy cannot compute this node, as the end of a message, or ""."""
    alternatives = "pin 'gemv', 'segments' or 'aten'"
    if node.target is EMBEDDING_OP and name != ATEN:
        return ", but embeddings have a single strategy; remove the pin, or pin 'aten'"
    if name == CONCAT and (why := _not_concat(node)):
        return f", {why}; {alternatives}"
    if name in FUSED and node.target is not FUSED_OP:
        return f", whose base product is not part of the node; {alternatives}"
    if name in FUSED and not _fusable(node):
        return f", whose base weight lies column by column; {alternatives}"
    return ""


def _work(ctx: Context, node: fx.Node) -> Work | None:
    rows, sites = _rows(node), _sites(ctx, node)
    if rows is None or node.target is EMBEDDING_OP:
        return None
    bank = _bank(ctx, node)
    slots, rank = len(bank.ranks), bank.slot_rank  # the rank of most adapters
    requests = fake_value(bound(node)["slots"]).shape[0]
    slots = min(slots, requests) if isinstance(requests, int) else slots
    dtype = fake_value(bound(node)["x"]).dtype
    return work_of(_parts(sites), rows, slots, rank, dtype, chip_of(fake_value(node).device))


def _fusable(node: fx.Node) -> bool:
    """Whether a kernel may compute the base product, from a weight layout that it can read."""
    return node.target is FUSED_OP and adjacent(fake_value(bound(node)["weight"]))


def _not_concat(node: fx.Node) -> str:
    """Why x and the weight of the vendor's GEMM cannot be extended, or ""."""
    if node.target is not FUSED_OP:
        return "whose base product is not part of the node"
    weight = fake_value(bound(node)["weight"])
    dtypes = {fake_value(node).dtype, fake_value(bound(node)["x"]).dtype, weight.dtype}
    if len(dtypes) != 1:
        return "whose x, weight and result are not of one type"
    why = not_concat(delta_spec(node), weight.dtype)
    return why and f"whose x and weight cannot be made longer: {why}"


def _rows(node: fx.Node) -> int | None:
    value = fake_value(node)
    rows = 1
    for size in value.shape[:-1]:
        hint = size_hint(size)
        if hint is None:
            return None
        rows *= hint
    return rows


def _pinned(ctx: Context, node: fx.Node) -> str | None:
    plan = ctx.program.options.plan
    pinned = {plan[path] for path in _paths(ctx, node) if path in plan}
    if len(pinned) > 1:
        raise ConfigError(
            f"Options.plan pins {', '.join(sorted(pinned))} for "
            f"{', '.join(_paths(ctx, node))}, which a single node computes; pin one "
            "strategy for all of them, or switch the pass `pack` off"
        )
    return next(iter(pinned), None)


def _sites(ctx: Context, node: fx.Node) -> list[Site]:
    return [state.site for state in ctx.states[node]]


def _bank(ctx: Context, node: fx.Node) -> Bank:
    return ctx.program.home(_sites(ctx, node)[0])[0].bank


def _paths(ctx: Context, node: fx.Node) -> list[str]:
    return [site.path for site in _sites(ctx, node)]


def _splits_product(node: fx.Node) -> bool:
    if node.target is not FUSED_OP:
        return False
    call = bound(node)
    value = fake_value(call["weight"])
    return len(call["sizes"]) > 1 and split_is_faster(value.dtype, value.device)


def _parts(sites: Sequence[Site]) -> list[Part]:
    return [part for site in sites for part in site.parts]


def _floor(ctx: Context, node: fx.Node) -> str:
    sites = _sites(ctx, node)
    rank = _bank(ctx, node).slot_rank
    single, eight = (byte_floor(_parts(sites), rank, distinct) for distinct in (1, 8))
    return (
        f"byte floor at rank {rank}: {single:.2f} times the base weight's bytes with 1 adapter, "
        f"{eight:.2f} times with 8"
    )
