"""Choose how each LoRA node is computed, and say so.

On a CPU a node runs as generated C++ (one kernel a shape, that reads only the active adapters,
each at its own rank) or as plain aten. The choice is data on the node: users pin it by site path
(`Options.plan`), `lower` only carries it out, `explain` prints it with the node's byte floor

of `lorafx.kernels.cost`. A pack's base product is one GEMM, or one a sibling where that is faster.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from lorafx.context import EMBEDDING_OP, FUSED_OP, Context
from lorafx.errors import ConfigError
from lorafx.frame import arguments_of, fake_value
from lorafx.kernels.cost import byte_floor, split_is_faster
from lorafx.kernels.cpu import DeltaSpec, build_all
from lorafx.strategy import ATEN, GENERATED, Strategy, choose


@dataclass(frozen=True)
class Plan:
    name: str = "plan"
    required: bool = False

    def run(self, gm: fx.GraphModule, ctx: Context) -> int:
        wanted = {node: _wanted(ctx, node) for node in ctx.states}
        specs = {node: delta_spec(node) for node, name in wanted.items() if name == GENERATED}
        kernels = build_all(specs.values())
        for node, name in wanted.items():
            spec = specs.get(node)
            built = spec is not None and kernels[spec] is not None
            name_built = GENERATED if built else ATEN
            reason = _reason(ctx, node, name, built)
            choose(ctx, node, Strategy(name_built, split=_split(node), reason=reason))
        return len(wanted)


def _wanted(ctx: Context, node: fx.Node) -> str:
    """The strategy that the user pinned, else the best that the device has.

    Raises:
        ConfigError: the node computes several sites, pinned to different strategies.
    """
    program = ctx.program
    pinned = {program.options.plan[p] for p in _paths(ctx, node) if p in program.options.plan}
    if len(pinned) > 1:
        raise ConfigError(
            f"Options.plan pins {', '.join(sorted(pinned))} for {', '.join(_paths(ctx, node))}, "
            "which one node computes; pin one strategy for all of them, or switch `pack` off"
        )
    if pinned:
        return pinned.pop()
    on_cpu = fake_value(node).device.type == "cpu"
    return GENERATED if on_cpu and program.options.lowering != "reference" else ATEN


def _paths(ctx: Context, node: fx.Node) -> list[str]:
    return [state.site.path for state in ctx.states[node]]


def _split(node: fx.Node) -> bool:
    """Whether a pack's base product is better done a sibling at a time."""
    if node.target is not FUSED_OP:
        return False
    weight, sizes = arguments_of(node)[1], arguments_of(node)[10]
    value = fake_value(weight)
    return len(sizes) > 1 and split_is_faster(value.dtype, value.device)


def _reason(ctx: Context, node: fx.Node, wanted: str, built: bool) -> str:
    sites = [state.site for state in ctx.states[node]]
    # From the bank itself: in a frame that tracing knows less of, its sizes may be symbols.
    rank = ctx.program.home(sites[0])[0].bank.B.shape[1]
    floors = [byte_floor(sites, rank, distinct) for distinct in (1, 8)]
    text = f"byte floor at rank {rank}: {floors[0]:.3f} with 1 adapter, {floors[1]:.3f} with 8"
    if wanted == GENERATED and not built:
        text += "; no kernel could be generated"
    return text


def delta_spec(node: fx.Node) -> DeltaSpec:
    """What a kernel for this node may take for granted; only metadata is read."""
    value = fake_value
    if node.target is EMBEDDING_OP:
        _, y, A, B = arguments_of(node)[:4]
        return DeltaSpec.of_embedding(value(y), value(A), value(B))
    if node.target is FUSED_OP:
        x, _, _, A, B, ranks, _, _, siblings, offsets, sizes = arguments_of(node)[:11]
    else:
        x, _, A, B, ranks, _, _, sibling, offset = arguments_of(node)[:9]
        siblings, offsets, sizes = [sibling], [offset], [value(node).shape[-1]]
    tensors = (value(node), value(x), value(A), value(B), value(ranks))
    return DeltaSpec.linear(*tensors, siblings, offsets, sizes)
