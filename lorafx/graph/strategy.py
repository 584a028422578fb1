"""The plan as data: which strategy each LoRA node uses, and why."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from lorafx.graph.context import Context

GENERATED = "generated"
ATEN = "aten"

_KEY = "lorafx_strategy"


@dataclass(frozen=True)
class Strategy:
    """The choice for one node.

    Attributes:
        name: how the node is computed, one of `lorafx.config.STRATEGIES` of the lowering.
        kernel: id of the generated Triton kernels; 0 for other strategies.
        split: a pack's base product is one GEMM per sibling, each into its columns of y, instead of
            one over the packed weight.
        reason: what decided.
    """

    name: str
    kernel: int = 0
    split: bool = False
    reason: str = ""


def choose(ctx: Context, node: fx.Node, strategy: Strategy) -> None:
    """Make `strategy` the node's, and note it for `explain`."""
    node.meta[_KEY] = strategy
    if strategy.kernel:
        ctx.kernels.add(strategy.kernel)
    for state in ctx.states[node]:
        gemms = ", one GEMM per sibling" if strategy.split else ""
        state.strategy = f"{strategy.name}{gemms} ({strategy.reason})"


def strategy_of(node: fx.Node) -> Strategy:
    """The node's strategy; aten where nothing was planned."""
    return node.meta.get(_KEY, Strategy(ATEN))
