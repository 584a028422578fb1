"""The plan as data: which strategy each LoRA node uses, and why."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from lorafx.config import STRATEGIES
from lorafx.context import Context

GENERATED, ATEN = STRATEGIES

_KEY = "lorafx_strategy"


@dataclass(frozen=True)
class Strategy:
    """The choice for one node.

    Attributes:
        name: how the delta is computed, one of STRATEGIES.
        split: a pack's base product is one GEMM a sibling, each into its columns of y, instead of
            one over the packed weight.
        reason: what decided.
    """

    name: str
    split: bool = False
    reason: str = ""


def choose(ctx: Context, node: fx.Node, strategy: Strategy) -> None:
    """Make `strategy` the node's, and note it for `explain`."""
    node.meta[_KEY] = strategy
    for state in ctx.states[node]:
        gemms = ", a GEMM a sibling" if strategy.split else ""
        state.strategy = f"{strategy.name}{gemms} ({strategy.reason})"


def strategy_of(node: fx.Node) -> Strategy:
    """The node's strategy; aten where nothing was planned."""
    return node.meta.get(_KEY, Strategy(ATEN))
