"""How a node with LoRA is computed: its strategy, and the specs of kernels for it."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import fx

from lorafx.kernels.ops.delta_spec import DeltaSpec
from lorafx.kernels.ops.op_library import Ranges
from lorafx.kernels.triton.build import TritonSpec
from lorafx.op_arguments import bound
from lorafx.program.context import EMBEDDING_OP, EXPERT_OP, FUSED_OP, Context
from lorafx.program.frame import fake_value

GENERATED = "generated"
ATEN = "aten"
_KEY = "lorafx_strategy"


@dataclass(frozen=True)
class Strategy:
    """How a node is computed: a name of `lorafx.config.STRATEGIES`, the id of Triton kernels or 0,
    whether a pack's base product is `split` into a GEMM per sibling, and the reason."""

    name: str
    kernel: int = 0
    split: bool = False
    reason: str = ""


def choose(ctx: Context, node: fx.Node, strategy: Strategy) -> None:
    """Set the node's strategy, and note it for `explain`."""
    node.meta[_KEY] = strategy
    if strategy.kernel:
        ctx.kernels.add(strategy.kernel)
    for state in ctx.states[node]:
        gemms = ", one GEMM per sibling" if strategy.split else ""
        state.strategy = f"{strategy.name}{gemms} ({strategy.reason})"


def is_planned(node: fx.Node) -> bool:
    return _KEY in node.meta


def strategy_of(node: fx.Node) -> Strategy:
    """The node's strategy; aten if unplanned."""
    return node.meta.get(_KEY, Strategy(ATEN))


def delta_spec(node: fx.Node) -> DeltaSpec:
    """The spec of a kernel for the node's delta."""
    call = bound(node)
    if node.target is EMBEDDING_OP:
        return DeltaSpec.of_embedding(*(fake_value(call[name]) for name in ("y", "A", "B")))
    tensors = (fake_value(call[name]) for name in ("x", "A", "B", "ranks"))
    return DeltaSpec.linear(fake_value(node), *tensors, *(call[name] for name in Ranges._fields))


def cpu_spec(node: fx.Node) -> DeltaSpec:
    """`delta_spec` for a CPU, whose kernels find the slots of routed rows."""
    spec = delta_spec(node)
    if node.target is EXPERT_OP:
        return replace(spec, experts=bound(node)["count"])
    return spec


def triton_spec(node: fx.Node) -> TritonSpec:
    """`delta_spec`, with the base weight if it is part of the node."""
    if node.target is not FUSED_OP:
        return TritonSpec(delta_spec(node))
    call = bound(node)
    weight, bias = fake_value(call["weight"]), call["bias"] is not None
    n, slots = fake_value(call["slots"]).shape[0], fake_value(call["B"]).shape[0]
    # There is a block for each request, or for each slot if these are fewer.
    by_request = isinstance(n, int) and n < slots
    return TritonSpec(delta_spec(node), weight.dtype, bias, call["transposed"], by_request)
