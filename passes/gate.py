"""Gates: a token's delta is a sum of those of k adapters, each with the token's weight.

    y' = site(x, y, bank, slots, rows)   →   Δ_j = site(x, 0, bank, slots_j, rows)
                                             y'  = y + Σ_j w_j[m] Δ_j

with slots_j and w_j (n,) of `lorafx.model.runtime.Gates`, and row m that of the token
(m // rows) mod n. A row without a gate keeps the bits of y.

Scales, biases and own weights of adapters are not linear in a weight: a session refuses gates for
adapters that have any, so the ops lose their arguments for them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx

from lorafx.kernels.ops.own_rows import OwnRows
from lorafx.op_arguments import bound, in_order, rebind
from lorafx.ownership.site_rules import row_dims
from lorafx.program.context import COPIED, Context, is_site
from lorafx.program.frame import GATE_SLOTS, GATE_WEIGHTS, fake_value
from lorafx.program.refusals import Refusal
from lorafx.program.row_maps import ALL_ALIKE

aten = torch.ops.aten

#: Arguments of adapters that are not linear in a weight, and for products that are not here.
_DROPPED = ("gains", "addend", "shifts", "weight", "bias", *OwnRows._fields)


@dataclass(frozen=True)
class Gate:
    """A token's delta is the sum of those of several adapters, with its weights."""

    name: str = "gate"
    required: bool = True

    def run(self, gm: fx.GraphModule, ctx: Context) -> int:
        # Where rows are not proved, a refusal stops the adapters that touch the site.
        sites = [n for n in gm.graph.nodes if is_site(n) and bound(n)["rows"] not in (0, ALL_ALIKE)]
        sites = [node for node in sites if ctx.frame.gates and not _permuted(ctx, node)]
        if not sites:
            return 0
        slots, weights = (
            ctx.gates_input(name, dtype, bound(sites[0])["slots"])
            for name, dtype in ((GATE_SLOTS, torch.int32), (GATE_WEIGHTS, torch.float32))
        )
        with gm.graph.inserting_before(sites[0]):
            # Copies: kernels take the beginning of a buffer for aligned.
            each = [
                ctx.emit(aten.clone.default, ctx.emit(aten.select.int, slots, 0, gate))
                for gate in range(ctx.frame.gates)
            ]
        for node in sites:
            _gate(ctx, node, each, weights)
        return len(sites)


def _permuted(ctx: Context, node: fx.Node) -> bool:
    """Whether the rows of a site have slots of their own, behind those of the requests. A refusal
    then stops the adapters that touch it."""
    if bound(node)["slots"].op == "placeholder":
        return False
    sites = tuple(state.site for state in ctx.states[node])
    ctx.refuse(Refusal(sites, "mixed", "its rows are permuted, and no gates follow them"))
    rebind(node, rows=ALL_ALIKE)
    return True


def _gate(ctx: Context, node: fx.Node, slots: Sequence[fx.Node], weights: fx.Node) -> None:
    call, state = bound(node), ctx.states.pop(node)
    call.update((name, None) for name in _DROPPED if name in call)
    y, dims = call["y"], row_dims(node)
    value = fake_value(y)

    def added(y: Tensor, w: Tensor, *deltas: Tensor) -> Tensor:
        w = w.view(len(deltas), *y.shape[:dims], *[1] * (y.dim() - dims))
        total, some = w[0] * deltas[0], w[0] != 0
        for gate in range(1, len(deltas)):
            total, some = total + w[gate] * deltas[gate], some | (w[gate] != 0)
        return torch.where(some, (y + total).to(y.dtype), y)

    with ctx.graph.inserting_before(node):
        sizes = [ctx.size(y, dim) for dim in range(value.dim())]
        settings = {"dtype": value.dtype, "device": value.device}
        call["y"] = ctx.emit(aten.full.default, sizes, 0, **settings)
        deltas = []
        for own in slots:
            deltas.append(ctx.emit(node.target, *in_order(node.target, {**call, "slots": own})))
            deltas[-1].meta.update({key: node.meta[key] for key in COPIED if key in node.meta})
            ctx.states[deltas[-1]] = [replace(item) for item in state]
        owner = ctx.row_owners(weights, call["rows"], ctx.row_count(y, dims))
        rows = ctx.emit(aten.index.Tensor, weights, [None, owner])
        total = ctx.traced(added, y, rows, *deltas)
        ctx.gated[total] = state
        node.replace_all_uses_with(total)
    ctx.graph.erase_node(node)
