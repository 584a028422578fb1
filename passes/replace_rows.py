"""Rows of a weight that adapters have of their own go before the delta, as an op of their own.

    y' = site(x, y, ..., own...)   →   y₁ = own_linear(x, y, own..., slots, rows)
                                       y' = site(x, y₁, ...)

with the slots and rows that were proved for the site, and own_embedding for an embedding. This
happens only where banks have room for such rows; otherwise no site takes any. In what reads y, the
base's product, nothing changes: later passes find it behind an op that they leave alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

import lorafx.kernels.ops.own_rows  # noqa: F401  (defines torch.ops.lorafx)
from lorafx.graph.context import EMBEDDING_OP, SITE_OP, Context
from lorafx.kernels.ops.own_rows import OwnRows
from lorafx.op_arguments import bound, in_order, rebind
from lorafx.passes.provenance import ALL_ALIKE

OWN_OPS = {
    SITE_OP: torch.ops.lorafx.own_linear.default,
    EMBEDDING_OP: torch.ops.lorafx.own_embedding.default,
}


@dataclass(frozen=True)
class ReplaceRows:
    """Rows of a weight that adapters have of their own take the place of the base's."""

    name: str = "replace_rows"
    required: bool = True

    def run(self, gm: fx.GraphModule, ctx: Context) -> int:
        edits = 0
        for node in gm.graph.nodes:
            op = OWN_OPS.get(node.target)
            if op is None or bound(node).get("own") is None:
                continue
            call = bound(node)
            # Unproved rows: the site's own op refuses batches that mix adapters.
            call["rows"] = call["rows"] or ALL_ALIKE
            with gm.graph.inserting_before(node):
                y = ctx.call(gm.graph, op, in_order(op, call))
            rebind(node, y=y, **dict.fromkeys(OwnRows._fields))
            edits += 1
        return edits
