"""The plan as data: which strategy each LoRA node uses, why, and with which kernel."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from lorafx.context import Context

_KEY = "lorafx_strategy"


@dataclass(frozen=True)
class Strategy:
    """The choice for one node.

    Attributes:
        name: the strategy.
        kernel: id of the generated kernel that runs it, 0 for aten.
        reason: what decided.
    """

    name: str
    kernel: int = 0
    reason: str = ""


ATEN = Strategy("aten", reason="no generated kernel")


def choose(ctx: Context, node: fx.Node, strategy: Strategy) -> None:
    """Make `strategy` the node's, and note it for `explain`."""
    node.meta[_KEY] = strategy
    for state in ctx.states[node]:
        state.strategy = f"{strategy.name} ({strategy.reason})"


def kernel_id(ctx: Context, node: fx.Node) -> int:
    """Id of the generated kernel that the plan chose for `node`, 0 for aten."""
    return node.meta.get(_KEY, ATEN).kernel
