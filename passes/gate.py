"""Gates: a token's delta is a sum of those of k adapters, each with the token's weight.

    y' = site(x, y, bank, slots, rows)   →   Δ_j = site(x, 0, bank, slots_j, rows)
                                             y'  = y + Σ_j w_j[m] Δ_j

with slots_j and w_j (n,) of `lorafx.model.runtime.Gates`, and row m that of the token
(m // rows) mod n. A row without a gate keeps the bits of y.

Rows with a route (`Arrow`) choose c of their k adapters, and weights, at each module:

    s = site(x, 0, bank, routes, rows)      |s_j[m]| is row m's likeness to adapter j
    slots'_i[m], w_i[m]                     of the i-th largest: softmax(|s| / temperature)

Scales, biases and own weights of adapters are not linear in a weight: a session refuses gates for
adapters that have any, so the ops lose their arguments for them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from lorafx.kernels.ops.own_rows import OwnRows
from lorafx.op_arguments import bound, in_order, rebind
from lorafx.ownership.site_rules import row_dims
from lorafx.program.context import COPIED, Context, is_site
from lorafx.program.frame import fake_value
from lorafx.program.refusals import Refusal
from lorafx.program.row_maps import ALL_ALIKE

aten = torch.ops.aten

#: Fields of `Gates`; the last three are for rows that choose.
_FIELDS = ("slots", "weights", "routes", "top_k", "temperatures")
#: Arguments of adapters that are not linear in a weight, and for products that are not here.
_DROPPED = ("gains", "addend", "shifts", "weight", "bias", *OwnRows._fields)


@dataclass(frozen=True)
class Gate:
    """A token's delta is the sum of those of several adapters, with its weights."""

    name: str = "gate"
    required: bool = True

    def run(self, gm: fx.GraphModule, ctx: Context) -> int:
        form = ctx.frame.slots
        if not form.gates:
            return 0
        # Where rows are not proved, a refusal stops the adapters that touch the site.
        sites = [n for n in gm.graph.nodes if is_site(n) and bound(n)["rows"] != ALL_ALIKE]
        sites = [node for node in sites if not _refused(ctx, node)]
        if not sites:
            return 0
        inputs = {
            name: ctx.gates_input(name, bound(sites[0])["slots"])
            for name in (_FIELDS if form.chosen else _FIELDS[:2])
        }
        with gm.graph.inserting_before(sites[0]):
            # Copies: kernels take the beginning of a buffer for aligned.
            each = [
                ctx.emit(aten.clone.default, ctx.emit(aten.select.int, inputs["slots"], 0, gate))
                for gate in range(0 if form.chosen else form.gates)
            ]
        for node in sites:
            _gate(ctx, node, inputs, each)
        return len(sites)


def _refused(ctx: Context, node: fx.Node) -> bool:
    """Whether it is not known which gates the rows of a site have; adapters that touch it are then
    refused."""
    if bound(node)["rows"] == 0:
        reason = "row ownership was not analysed"
    elif bound(node)["slots"].op != "placeholder":
        reason = "its rows are permuted, and no gates follow them"
    elif ctx.frame.slots.layers and not ctx.frame.begins_call:
        reason = "layers may share its graph, and each has weights of its own"
    else:
        return False
    sites = tuple(state.site for state in ctx.states[node])
    ctx.refuse(Refusal(sites, "mixed", reason))
    rebind(node, rows=ALL_ALIKE)
    return True


def _gate(
    ctx: Context, node: fx.Node, inputs: Mapping[str, fx.Node], slots: Sequence[fx.Node]
) -> None:
    call, state, form = bound(node), ctx.states.pop(node), ctx.frame.slots
    call.update((name, None) for name in _DROPPED if name in call)
    op: Any = node.target
    y, dims = call["y"], row_dims(node)
    value = fake_value(y)

    def delta(**own: Any) -> fx.Node:
        made = ctx.emit(op, *in_order(op, {**call, **own}))
        made.meta.update({key: node.meta[key] for key in COPIED if key in node.meta})
        ctx.states[made] = [replace(item) for item in state]
        return made

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
        owner = ctx.row_owners(inputs["weights"], call["rows"], ctx.row_count(y, dims))
        weights = inputs["weights"]
        if form.layers:  # adapters touch no others
            path = state[0].site.path
            layer = form.layers.index(path) if path in form.layers else 0
            weights = ctx.emit(aten.select.int, weights, 0, layer)
        weights = ctx.emit(aten.index.Tensor, weights, [None, owner])
        if form.chosen:
            routes = ctx.emit(aten.clone.default, inputs["routes"])
            likeness = delta(slots=routes)
            fields = (inputs[name] for name in _FIELDS if name != "weights")
            choose = partial(_chosen, form.chosen)
            own, weights = ctx.traced(choose, likeness, owner, weights, *fields)
            each = [
                ctx.emit(aten.select.int, own, 0, gate) for gate in range(ctx.frame.slots.chosen)
            ]
            deltas = [delta(slots=ctx.emit(aten.clone.default, item), rows=1) for item in each]
        else:
            deltas = [delta(slots=item) for item in slots]
        total = ctx.traced(added, y, weights, *deltas)
        ctx.gated[total] = state
        node.replace_all_uses_with(total)
    ctx.graph.erase_node(node)


def _chosen(
    count: int,
    likeness: Tensor,
    owner: Tensor,
    weights: Tensor,
    slots: Tensor,
    routes: Tensor,
    top_k: Tensor,
    temperatures: Tensor,
) -> tuple[Tensor, Tensor]:
    """The slots and weights (count, M) of what each row chooses, by its `likeness` (…, N), of
    which the first k outputs are those to its gates."""
    gates = slots.shape[0]
    own = slots[:, owner]
    scores = likeness.reshape(-1, likeness.shape[-1])[:, :gates].abs().float()
    scores = torch.where(own.T >= 0, scores, -torch.inf)
    best, order = scores.topk(count, dim=1)
    kept = torch.arange(count, device=owner.device) < top_k[owner][:, None]
    shares = ((best - best[:, :1]) / temperatures[owner][:, None]).exp() * kept
    shares = shares / shares.sum(1, keepdim=True)
    routed = routes[owner] >= 0
    order = torch.where(routed[:, None] & kept, order, 0).T
    chosen = torch.where(routed & kept.T, own.gather(0, order), -1)
    given = torch.arange(count, device=owner.device)[:, None] == 0
    chosen = torch.where(~routed & given, own[:1], chosen)
    shares = torch.where(routed & kept.T, shares.T, torch.where(given & ~routed, weights[:1], 0.0))
    return chosen.to(torch.int32), shares
