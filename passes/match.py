"""Map every use of a selected module's weight to its site, and make every use carry its delta.

A use already has a mark (the hook's `site` op on y or on y + bias), or is a linear, embedding or
convolution that bypasses its module's call and gets the op here, or is refused by name. A mark
after other arithmetic of the module (a scaled embedding, a router's softmax) moves to the use of
the weight, so that the result is that of W + ΔW. A module whose own forward changes its input first
keeps its mark, the delta of its argument, unless `Options.delta_of` is "weight"; one that
multiplies by its weight twice is refused. Modules without a plain weight tensor or with a
registered handler keep their marks. Routed experts are in lorafx.program.expert_sites.

A site is also refused if a graph seems to replace its weight: an unused linear in a module that
multiplies by other tensors, such as a product of two weights (lorafx.program.derived).

One file: each helper decides one thing about a use, and only in the order of `run` are they right.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import torch
from torch import fx

from lorafx.model.convolutions import convolution_of
from lorafx.model.extras import EXTRAS
from lorafx.model.made_weights import maker_of
from lorafx.model.marks import UNPROVED
from lorafx.model.quantized import is_stored
from lorafx.model.sites import Site, own_ranges
from lorafx.model.weight_formats import is_dense
from lorafx.op_arguments import bound, in_order, operand, rebind
from lorafx.ownership.flow import place
from lorafx.ownership.propagate import ancestors
from lorafx.program.addends import (
    addends_behind,
    addends_of,
    check_addends,
    refuse_used_bias,
    rescales,
    set_addend,
    use_behind,
)
from lorafx.program.context import (
    CONV_OP,
    EMBEDDING_OP,
    GROUPED_OP,
    SITE_OP,
    Context,
    SiteState,
    is_site,
)
from lorafx.program.expert_sites import insert_expert_sites, nonnegative
from lorafx.program.frame import fake_value
from lorafx.program.inputs import MADE, FrameInput
from lorafx.program.lost_sites import constant_weights, lost_calls, replaced_sites
from lorafx.program.module_calls import ModuleCall
from lorafx.program.program import SHIFTS
from lorafx.program.refusals import Refusal
from lorafx.program.weight_uses import (
    SITE_KINDS,
    Use,
    convolution_uses,
    is_constant,
    uses_of,
)

aten = torch.ops.aten


def _convolution_refusal(site: Site, use: Use) -> Refusal | None:
    """The refusal of a convolution that A, with the module's stride and padding, does not fit."""
    module, call = convolution_of(site.module), bound(use.node)
    if call["transposed"] or call["groups"] != module.groups:
        reason = "its weight is used in a convolution of another kind than its own"
    elif any(step != 1 for step in call["dilation"]):
        reason = "its weight is used past its own call in a convolution with dilation"
    elif module.padding_mode != "zeros":
        reason = f"its weight is used past its own call, which has {module.padding_mode!r} padding"
    else:
        return None
    return Refusal((site,), "always", reason)


def _insert_conv_site(ctx: Context, use: Use, values: Mapping[str, Any]) -> fx.Node:
    call = bound(use.node)
    padding = call["padding"]
    pads = [size for size in padding for _ in range(2)]
    kernel = [int(size) for size in use.weight.meta["val"].shape[2:]]
    window = {"kernel": kernel, "stride": call["stride"], "pads": pads}
    arguments = in_order(CONV_OP, values, x=use.x, addend=None, **window)
    return ctx.emit(CONV_OP, *arguments)


_USED_BEFORE = (
    "its weight is also used outside its own call, where the delta is added, and its handler adds "
    "it to that result again"
)
_COMPILED_APART = (
    "its class overrides forward, and a graph break puts the forward and the mark into separate "
    "graphs"
)
_TWICE = (
    "its forward multiplies by its weight more than once, where PEFT adds one delta, that of its "
    "argument; use a module for each product"
)
_MAYBE_A_TANGENT = (
    "its module has no bias of its own, by which a product outside of its call could be told from "
    "the derivative of one, which has none"
)
_MADE = (
    "its class overrides forward, and a hook or a parametrisation computes its weight, so what the "
    "forward multiplies is not known"
)


@dataclass(frozen=True)
class Match:
    """Every use of a selected weight carries its delta, or becomes a refusal."""

    name: str = "match"
    required: bool = True

    def run(self, gm: fx.GraphModule, ctx: Context) -> int:
        marks = {node: ctx.site_of_mark(node) for node in gm.graph.nodes if is_site(node)}
        given = {mark: weight for mark in marks if (weight := _taken_weight(mark)) is not None}
        uses = _uses(ctx)
        # A module that multiplies by blocks of W may return anything.
        products = {node: use for node, use in uses.items() if use.kind != "blocks"}
        origins = {mark: _origin(ctx, mark, site, products) for mark, site in marks.items()}
        for mark, site in marks.items():
            ctx.record(site, mark, origins[mark])
            if origins[mark] is not None and rescales(mark):
                addends = addends_of(bound(mark)["y"], products)
                set_addend(ctx, site, mark, addends)
            if origins[mark] is not None and _forward_unknown(site):
                has_bias = check_addends(ctx, site, addends_of(bound(mark)["y"], products))
                if not has_bias and bound(mark).get(SHIFTS) is not None:
                    rebind(mark, **{SHIFTS: None})
            if _forward_unknown(site) and bound(mark)["y"].op == "placeholder":
                ctx.refuse(Refusal((site,), "always", _COMPILED_APART))
        refuse_used_bias(ctx, marks, uses)
        kept = _settle_calls(ctx, marks, origins, uses)
        claimed = {origin.node for origin in origins.values() if origin is not None}
        claimed.update(node for nodes in kept.values() for node in nodes)

        inputs = [ctx.frame.by_node[use.weight] for use in uses.values()]
        whole = set(marks.values()).union(*(i.sites for i in inputs if i.derived is None))
        seen = whole.union(*(i.sites for i in inputs))
        ctx.program.reached.update(site.path for site in seen)
        used = {site for item in inputs for site in item.sites}
        lost = lost_calls(ctx, set(marks.values()), used)
        found = replaced_sites(ctx, seen - whole), lost, constant_weights(ctx)
        for refusal in chain.from_iterable(found):
            ctx.refuse(refusal)
        edits = 0
        added: dict[int, set[fx.Node]] = {}
        moved: dict[fx.Node, fx.Node] = {}
        order = {node: number for number, node in enumerate(gm.graph.nodes)}
        # In the order of the graph, so that x has its own delta where it is a product, too.
        for use in sorted(uses.values(), key=lambda use: order[use.node]):
            if use.node in claimed:
                continue
            marked = _site_with_mark(ctx, use)
            if marked is not None:
                if marked not in marks.values() and id(marked.module) not in ctx.frame.callers:
                    ctx.refuse(Refusal((marked,), "always", "its own call added no delta"))
                continue
            owner = _owner(ctx, use)
            if isinstance(owner, Site):
                owner = _resized(ctx, owner, use) or owner
            if isinstance(owner, Refusal):
                ctx.refuse(owner)
            elif owner is not None:
                if _mark_follows(ctx, owner, use):
                    continue
                moved[use.node] = _insert(ctx, owner, _current(use, moved))
                added.setdefault(id(owner), set()).add(use.node)
                edits += 1
        edits += insert_expert_sites(ctx)
        for mark, site in marks.items():
            nodes = added.get(id(site))
            if origins[mark] is not None and mark not in kept:
                continue
            if mark in kept or not nodes or nodes.isdisjoint(ancestors([bound(mark)["y"]])):
                stored = is_stored(site.module, site.eligible)
                if site.own_rows and _forward_unknown(site) and not stored:
                    ctx.refuse(Refusal((site,), "own", "what its forward computes is not known"))
                continue
            if site.eligible.handler is not None:
                ctx.refuse(Refusal((site,), "always", _USED_BEFORE))
            else:
                # The delta is now at the weight's use; a second one would count it twice.
                moved[mark] = bound(mark)["y"]
                mark.replace_all_uses_with(moved[mark])
                ctx.states.pop(mark)
                gm.graph.erase_node(mark)
                edits += 1
        for state in (state for states in ctx.states.values() for state in states):
            state.use = state.use and _current(state.use, moved)
        for node, (state,) in ctx.states.items():
            _give_weight(ctx, node, state, given.get(node))
        return edits


def _taken_weight(mark: fx.Node) -> fx.Node | None:
    """The weight that a mark read for turned inputs, which it has no more: that is no use of it."""
    if mark.target is not SITE_OP or bound(mark)["own"] is None:
        return None
    weight = bound(mark)["weight"]
    rebind(mark, weight=None)
    while isinstance(weight, fx.Node) and weight.op == "call_function":
        view, weight = weight, operand(weight)
        if not view.users:
            view.graph.erase_node(view)
    return weight


def _give_weight(ctx: Context, node: fx.Node, state: SiteState, given: fx.Node | None) -> None:
    """Adapters may turn the input of the product: with room for it, a site gets the weight, or
    what is `given` where another graph has the product."""
    call, weight = bound(node), given if state.use is None else state.use.weight
    if node.target is not SITE_OP or call["own"] is None or weight not in ctx.frame.by_node:
        return
    item = ctx.frame.by_node[weight]
    if item.derived is not None or item.part or fake_value(weight).dim() != 2:
        return
    with ctx.graph.inserting_before(node):
        if state.site.eligible.transposed:
            weight = ctx.emit(aten.permute.default, weight, [1, 0])
        rebind(node, weight=weight, bias=None)


def _origin(ctx: Context, mark: fx.Node, site: Site, products: dict[fx.Node, Use]) -> Use | None:
    """The use whose result the mark adds its delta to. That of W times a number has a delta times
    the number, so the delta moves there. What no rule knows is the product if the class of the
    module is the registered one."""
    use, _ = use_behind(bound(mark)["y"], products)
    if use is None or use.gains or (use.kind == "unknown" and _forward_unknown(site)):
        return None
    return use if site in ctx.frame.by_node[use.weight].sites else None


def _settle_calls(
    ctx: Context,
    marks: Mapping[fx.Node, Site],
    origins: dict[fx.Node, Use | None],
    uses: Mapping[fx.Node, Use],
) -> dict[fx.Node, list[fx.Node]]:
    """The marks that stay although their module multiplies something else than its argument, each
    with the products of its call. `origins` lose the marks whose delta moves to the product."""
    kept: dict[fx.Node, list[fx.Node]] = {}
    for mark, site in marks.items():
        if not _forward_unknown(site) or is_stored(site.module, site.eligible):
            continue
        if maker_of(site.module, site.eligible.weight):
            ctx.refuse(Refusal((site,), "always", _MADE))
        call = ModuleCall.of(ctx, site, mark, uses.values())
        twice = call.twice and site.may_change_input
        changes = call.changes_input and site.may_change_input
        if twice:
            ctx.refuse(Refusal((site,), "always", _TWICE))
        elif changes:
            ctx.program.note_changed_input(site)
        if twice or (changes and ctx.program.options.delta_of == "argument"):
            kept[mark] = [use.node for use in call.products]
        elif not call.takes_argument:
            origins[mark] = None
    return kept


def _current(use: Use, moved: Mapping[fx.Node, fx.Node]) -> Use:
    """`use` with the operands that it has by now."""

    def now(node: fx.Node | None) -> fx.Node | None:
        while node is not None and node in moved:
            node = moved[node]
        return node

    return replace(use, x=now(use.x), bias=now(use.bias))


def _uses(ctx: Context) -> dict[fx.Node, Use]:
    uses: dict[fx.Node, Use] = {}
    inputs: dict[int, set[fx.Node]] = {}
    for node, item in ctx.frame.by_node.items():
        if item.holder is not None:
            inputs.setdefault(id(item.holder.module), set()).add(node)
    for node, item in list(ctx.frame.by_node.items()):
        if item.kind != "weight" or any(site.eligible.kind == "experts" for site in item.sites):
            continue
        for use in _input_uses(node, item, inputs):
            other = uses.get(use.node)
            if other is not None and not _same_stored(ctx, use, other):
                unknown = _use_with_two_weights(ctx, other, use)
                ctx.refuse(ctx.unknown_use(unknown.weight, unknown.node, unknown.reason))
                use = _use_with_two_weights(ctx, use, other)
            uses[use.node] = use
    return uses


def _same_stored(ctx: Context, use: Use, other: Use) -> bool:
    items = ctx.frame.by_node
    return use.stored and other.stored and items[use.weight].sites == items[other.weight].sites


def _input_uses(node: fx.Node, item: FrameInput, inputs: Mapping[int, Set[fx.Node]]) -> list[Use]:
    """The uses of a weight or derived input. `inputs` are a frame's by the ids of their modules."""
    derived = item.derived
    if derived is None and any(site.eligible.kind == "conv" for site in item.sites):
        return convolution_uses(node)
    if derived is None and (item.part or fake_value(node).dim() != 2):
        reason = f"{item.label} is how it is stored, and this use is outside its module's call"
        if item.part == MADE:
            site = item.sites[0]
            maker = maker_of(site.module, site.eligible.weight) or "its module"
            reason = f"{maker} computes its weight, which is used outside its module's call"
        return [
            Use("unknown", node, user, stored=True, reason=reason)
            for user in (_users_of_made(node) if item.part == MADE else node.users)
            if isinstance(fake_value(user), torch.Tensor) or fake_value(user) is None
        ]
    if derived is None:
        transposed = any(site.eligible.transposed for site in item.sites)
        modules = {id(site.module) for site in item.sites}
        scales = {item for module in modules for item in inputs.get(module, ())}
        return uses_of(node, transposed=transposed, scales=scales)
    if derived.form is not None:
        return uses_of(node, transposed=False, part=(derived.form, derived.shape))
    reason = (
        f"{item.label} holds its values in an order, scale or precision that no rule "
        "covers; keep views of the weight, or copies of its rows"
    )
    return [Use("unknown", node, user, reason=reason) for user in node.users]


def _users_of_made(weight: fx.Node) -> list[fx.Node]:
    """The users of what a weight is made of, and of all that is made of it and of other inputs
    that are no data; a hook leaves it on the module for later ones."""
    made, users = {weight}, []
    for node in weight.graph.nodes:
        inputs = node.all_input_nodes
        if node.op != "output" and not is_site(node) and not made.isdisjoint(inputs):
            users.append(node)
            if all(item in made or is_constant(item) for item in inputs):
                made.add(node)
    return users


def _use_with_two_weights(ctx: Context, use: Use, other: Use) -> Use:
    """`use` as an unknown one: (W + ΔW)(V + ΔV) of two weights is no sum of deltas."""
    if use.kind == "unknown":
        return use
    label = ctx.frame.by_node[other.weight].label
    return Use("unknown", use.weight, use.node, reason=f"it is multiplied by {label}")


def _mark_follows(ctx: Context, site: Site, use: Use) -> bool:
    """Whether the use is made by a call of the module that continues after this graph, so that its
    mark is in a later one. Refuses a module that may return something else than x Wᵀ."""
    frame = ctx.frame
    inside = id(site.module) in frame.callers
    frame.inside[frame.positions[use.weight], frame.by_node[use.weight].sites.index(site)] = inside
    if inside and _forward_unknown(site):
        ctx.refuse(Refusal((site,), "always", _COMPILED_APART))
    return inside


def _forward_unknown(site: Site) -> bool:
    """Whether the module has no handler and may return something else than x Wᵀ."""
    return site.has_own_forward and site.eligible.handler is None


def _site_with_mark(ctx: Context, use: Use) -> Site | None:
    """The site whose mark adds the delta of this use: the use is made by its module's call, which
    computes x Wᵀ by a handler or from a stored format."""
    item = ctx.frame.by_node[use.weight]
    for site in item.sites:
        stored = bool(item.part) or not is_dense(fake_value(use.weight))
        stored = stored or is_stored(site.module, site.eligible)
        if not stored and site.eligible.handler is None:
            continue
        # After a graph break in the module's call, its mark is in a later graph.
        running = stored and id(site.module) in ctx.frame.callers
        if running or ctx.inside(use.node, site.module):
            return site
    return None


def _owner(ctx: Context, use: Use) -> Site | Refusal | None:
    """The site that a use belongs to; a refusal; or None if it belongs to a module without LoRA."""
    sites = ctx.frame.by_node[use.weight].sites
    if use.kind == "unknown":
        unknown = ctx.unknown_use(use.weight, use.node, use.reason)
        return None if ctx.made_by_other_holder(use.node, use.weight) else unknown
    where = f" ({place(use.node)})"
    if use.stored:
        dtype = fake_value(use.weight).dtype
        return Refusal(sites, "always", f"its weight ({dtype}) is used outside its call{where}")
    kind = SITE_KINDS[use.kind]
    fitting = [site for site in sites if site.eligible.kind == kind]
    if use.kind == "conv" and (refusal := _convolution_refusal(fitting[0], use)) is not None:
        return refusal
    unselected = ctx.unselected_holders(use.weight, kind)
    if len(fitting) == 1 and not unselected:
        return fitting[0]
    inside = [site for site in fitting if ctx.inside(use.node, site.module)]
    if len(inside) == 1:
        return inside[0]
    if unselected and (not fitting or any(ctx.inside(use.node, module) for module in unselected)):
        return None
    if not fitting and ctx.made_by_other_holder(use.node, use.weight):
        return None
    if not fitting:
        return Refusal(
            sites, "always", f"its weight is used as a {kind}, and its class is not one{where}"
        )
    return Refusal(
        tuple(fitting), "always", f"several modules share the weight of this {kind}{where}"
    )


def _resized(ctx: Context, site: Site, use: Use) -> Refusal | None:
    """The refusal of a linear whose weight was replaced by one of other sizes."""
    now, banks = list(fake_value(use.weight).shape), [site.out_features, site.in_features]
    whole = use.kind == "linear" and ctx.frame.by_node[use.weight].derived is None
    if not whole or now in (banks, banks[::-1]):
        return None
    return Refusal((site,), "always", f"its weight is {now} now, and its adapters are for {banks}")


def _insert(ctx: Context, site: Site, use: Use) -> fx.Node:
    """Add the site's op behind a use. Returns the product with its delta."""
    assert use.x is not None
    bank = ctx.bank_inputs(site, use.weight)
    y, later = use.node, addends_behind(use)
    users = list(y.users)
    with ctx.graph.inserting_before(y.next):
        x_rows, y_rows = use.x, y
        if use.swapped:
            x_rows, y_rows = _swapped(ctx, use.x), _swapped(ctx, y)
        call = {**bank, **own_ranges(site)._asdict(), "y": y_rows, "rows": UNPROVED}
        for gain in use.gains:
            if use.kind == "embedding":
                call["scales"] = ctx.emit(aten.mul.Tensor, call["scales"], gain)
            else:
                x_rows = ctx.emit(aten.mul.Tensor, x_rows, gain)
        if use.gains and use.kind == "embedding" and "own" in bank:
            ctx.refuse(Refusal((site,), "own", "its weight is scaled before it is used"))
        if use.wraps:
            x_rows = nonnegative(ctx, x_rows, site.weight_rows)
        if use.kind == "embedding":
            node = ctx.emit(EMBEDDING_OP, *in_order(EMBEDDING_OP, call, ids=x_rows))
        elif use.blocks is None:
            if not check_addends(ctx, site, [] if use.bias is None else [use.bias], later):
                call[SHIFTS] = None
            elif call.get(SHIFTS) is not None and getattr(site.module, "bias", None) is None:
                ctx.refuse(Refusal((site,), "bias", _MAYBE_A_TANGENT))
            if use.kind == "conv":
                node = _insert_conv_site(ctx, use, call)
            else:
                node = ctx.emit(SITE_OP, *in_order(SITE_OP, call, x=x_rows))
        else:
            for when, extra in EXTRAS.items():
                if bank.get(extra.room) is not None:
                    ctx.refuse(Refusal((site,), when, "its weight is used in blocks"))
            blocks = use.blocks._asdict()
            arguments = in_order(GROUPED_OP, call, x=x_rows, group_dim=0, **blocks)
            node = ctx.emit(GROUPED_OP, *arguments)
        last = _swapped(ctx, node) if use.swapped else node
    if rescales(node) and use.bias is not None:
        set_addend(ctx, site, node, [use.bias])
    for user in users:
        user.replace_input_with(y, last)
    ctx.record(site, node, use, form="rewritten")
    return last


def _swapped(ctx: Context, node: fx.Node) -> fx.Node:
    dims = list(range(fake_value(node).dim()))
    dims[-1], dims[-2] = dims[-2], dims[-1]
    return ctx.emit(aten.permute.default, node, dims)
