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
    """The choice for one node: its name, one of STRATEGIES, and what decided."""

    name: str
    reason: str = ""


def choose(ctx: Context, node: fx.Node, strategy: Strategy) -> None:
    """Make `strategy` the node's, and note it for `explain`."""
    node.meta[_KEY] = strategy
    for state in ctx.states[node]:
        state.strategy = f"{strategy.name} ({strategy.reason})"


def strategy_of(node: fx.Node) -> str:
    """The name of the node's strategy; aten where nothing was planned."""
    chosen = node.meta.get(_KEY)
    return ATEN if chosen is None else chosen.name
