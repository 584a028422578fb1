"""Map every use of a selected module's weight to its site, and make every use carry its delta.

A use either carries its mark already (the hook's `site` op on y or on y + bias), or is a linear in
disguise, which gets the op here (`F.linear(x, m.weight)`, `W @ x.mT`, MultiheadAttention's
out_proj), or is refused by name. A mark that stands behind other arithmetic of the module (a
scaled embedding, a router that goes on to softmax) is moved to the use of the weight, so that the
result is that of W + ΔW. A module that holds no plain weight tensor keeps its mark as it is, and so
does one with a registered handler, which says itself where the delta goes.

A convolution whose weight is used past its module's call gets its op (`F.conv2d(x, m.weight)`):

y = conv(x, W)   →   y' = conv_site(x, y, ...)

A site is refused where a graph seems to compute it with something other than its weight.

A tensor that was made from a weight is mostly recognised by its values (lorafx.program.derived).
Products of two weights, other formats and weights whose numbers cannot be read leave no such trace.
What remains visible is a linear that nothing uses, in a module that runs and multiplies by tensors
of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from lorafx.graph.context import (
    CONV_OP,
    EMBEDDING_OP,
    GROUPED_OP,
    SITE_OP,
    Context,
    Refusal,
    is_site,
)
from lorafx.graph.graph_nodes import plain_path
from lorafx.graph.weight_uses import Use, convolution_uses, uses_of
from lorafx.model.convolutions import convolution_of
from lorafx.model.forward_check import is_dense
from lorafx.model.marks import UNPROVED
from lorafx.model.quantized import is_stored
from lorafx.model.sites import Site, own_ranges
from lorafx.op_arguments import bound, in_order, rebind
from lorafx.passes.match.match_experts import insert_expert_sites
from lorafx.passes.match.own_bias import check_addends, refuse_other_uses
from lorafx.passes.match.result_origins import addends_of, depends_on, origin_of
from lorafx.program.derived import has_numbers, is_near
from lorafx.program.frame import FrameInput, fake_value

_UNUSED = "nothing uses its weight"


def replaced_sites(graph: fx.Graph, ctx: Context, in_parts: set[Site]) -> Iterator[Refusal]:
    """Refusals of sites that this graph seems to compute by something else than their weight.

    No graph so far has used the site, or this one uses parts of the weight alone (`in_parts`), and
    here a module that holds it runs with tensors of its own in place of it. For a weight whose
    numbers cannot be read any matrix will do; otherwise it takes an attribute or buffer with as
    many columns as the weight has inputs, since parameters of the module's own are common. What an
    earlier graph has computed with the site (keys and values of an encoder, kept for all decode
    steps) needs no second use.
    """
    frame, program = ctx.frame, ctx.program
    own = [
        (node, item.holder)
        for node, item in frame.by_node.items()
        if item.kind == "state" and item.holder is not None and _is_matrix(node)
        if not item.holder.is_own_weight
    ]
    if not own:
        return
    identities, paths = _running(graph)
    for site in program.sites:
        if site.eligible.kind != "linear":
            continue
        if site.path in program.reached and site not in in_parts:
            continue
        near = site.path.rpartition(".")[0]
        parent = program.graph.at(near)
        if parent is program.model:
            runs = frame.begins_call
        else:  # and not in part, as where its forward breaks into several graphs
            runs = str(id(parent)) in identities or near in paths
            runs = runs and id(parent) not in frame.callers
        if not runs:
            continue
        readable = has_numbers(site)
        for node, holder in own:
            value = fake_value(node)
            alike = not isinstance(holder.tensor, nn.Parameter) and site.in_features in value.shape
            if is_near(str(holder), near) and (alike or not readable):
                program.reached.add(site.path)
                program.replaced.add(site.path)
                used = "parts of its weight are used" if site in in_parts else _UNUSED
                yield Refusal(
                    (site,),
                    "always",
                    f"{used}, but {near or 'the model'} computes with {holder}, which may have "
                    "been made from it",
                )
                break


def _is_matrix(node: fx.Node) -> bool:
    value = fake_value(node)
    return bool(node.users) and value.dim() > 1 and value.is_floating_point()


def _running(graph: fx.Graph) -> tuple[set[str], set[str]]:
    """Identities, as text, and paths of the modules whose forwards made the graph's nodes."""
    stacks = (node.meta.get("nn_module_stack") or {} for node in graph.nodes)
    entries = {(str(key).partition("@")[0], path) for s in stacks for key, (path, _) in s.items()}
    return {name for name, _ in entries}, {plain_path(path) for _, path in entries}


def other_arithmetic(site: Site, use: Use) -> Refusal | None:
    """Why A cannot be convolved as this use convolves W, or None where it can.

    PEFT's A has the module's stride and padding, and zeros around x, whatever the use has."""
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


def insert_conv_site(graph: fx.Graph, ctx: Context, use: Use, values: Mapping[str, Any]) -> fx.Node:
    """The site's op on what the use computes; `values` are the bank's arguments, y and rows."""
    call = bound(use.node)
    padding = call["padding"]
    pads = [size for size in padding for _ in range(2)]
    kernel = [int(size) for size in use.weight.meta["val"].shape[2:]]
    window = {"kernel": kernel, "stride": call["stride"], "pads": pads}
    arguments = in_order(CONV_OP, values, x=use.x, addend=None, **window)
    return ctx.call(graph, CONV_OP, arguments)


aten = torch.ops.aten

USE_KINDS = {"linear": "linear", "blocks": "linear", "embedding": "embedding", "conv": "conv"}


@dataclass(frozen=True)
class Match:
    """Every use of a selected weight carries its delta, or the reason why it cannot is kept."""

    name: str = "match"
    required: bool = True

    def run(self, gm: fx.GraphModule, ctx: Context) -> int:
        marks = {node: ctx.site_of_mark(node) for node in gm.graph.nodes if is_site(node)}
        uses = _uses(ctx)
        # What a module returns is x Wᵀ where its y is; with blocks of W it may be anything.
        products = {node: use for node, use in uses.items() if use.kind != "blocks"}
        origins = {mark: origin_of(bound(mark)["y"], products) for mark in marks}
        for mark, site in marks.items():
            ctx.record(site, mark, origins[mark])
            if origins[mark] is not None and _rescales(mark):
                addends = addends_of(bound(mark)["y"], products)
                _leave_alone(gm.graph, ctx, site, mark, addends)
            if origins[mark] is not None and site.own_rows and _forward_unknown(site):
                check_addends(ctx, site, addends_of(bound(mark)["y"], products))
            if _forward_unknown(site) and bound(mark)["y"].op == "placeholder":
                ctx.refuse(_compiled_apart(site))
        refuse_other_uses(ctx, marks, uses)
        claimed = {origin.node for origin in origins.values() if origin is not None}

        inputs = [ctx.frame.by_node[use.weight] for use in uses.values()]
        whole = set(marks.values()).union(*(i.sites for i in inputs if i.derived is None))
        seen = whole.union(*(i.sites for i in inputs))
        ctx.program.reached.update(site.path for site in seen)
        for refusal in replaced_sites(gm.graph, ctx, seen - whole):
            ctx.refuse(refusal)
        edits = 0
        added: dict[int, set[fx.Node]] = {}
        for use in uses.values():
            if use.node in claimed:
                continue
            kept = _left_to_mark(ctx, use)
            if kept is not None:
                if kept not in marks.values() and id(kept.module) not in ctx.frame.callers:
                    ctx.refuse(Refusal((kept,), "always", "its own call added no delta"))
                continue
            site_or_none = _owner(ctx, use)
            if isinstance(site_or_none, Refusal):
                ctx.refuse(site_or_none)
            elif site_or_none is not None:
                if _mark_follows(ctx, site_or_none, use):
                    continue
                _insert(gm.graph, ctx, site_or_none, use)
                added.setdefault(id(site_or_none), set()).add(use.node)
                edits += 1
        edits += insert_expert_sites(gm.graph, ctx)
        for mark, site in marks.items():
            moved = added.get(id(site))
            if origins[mark] is not None:
                continue
            if not moved or not depends_on(bound(mark)["y"], moved):
                if site.own_rows and _forward_unknown(site):
                    ctx.refuse(Refusal((site,), "own", "what its forward computes is not known"))
                continue
            if site.eligible.handler is not None:
                ctx.refuse(_used_before(site))
            else:
                # The delta is at the weight's own use now; behind it would count it twice.
                mark.replace_all_uses_with(bound(mark)["y"])
                ctx.forget(mark)
                gm.graph.erase_node(mark)
                edits += 1
        return edits


def _uses(ctx: Context) -> dict[fx.Node, Use]:
    """All uses of weights of sites in the graph, by the node that computes y."""
    uses: dict[fx.Node, Use] = {}
    held: dict[int, set[fx.Node]] = {}
    for node, item in ctx.frame.by_node.items():
        if item.holder is not None:
            held.setdefault(id(item.holder.module), set()).add(node)
    for node, item in list(ctx.frame.by_node.items()):
        if item.kind != "weight" or any(site.eligible.kind == "experts" for site in item.sites):
            continue
        for use in _uses_of_input(node, item, held):
            other = uses.get(use.node)
            if other is not None and not _same_stored(ctx, use, other):
                joined = _joined(ctx, other, use)
                ctx.refuse(ctx.unknown_use(joined.weight, joined.node, joined.reason))
                use = _joined(ctx, use, other)
            uses[use.node] = use
    return uses


def _same_stored(ctx: Context, use: Use, other: Use) -> bool:
    """Whether two parts of one stored weight enter together: its numbers and their scales."""
    items = ctx.frame.by_node
    return use.stored and other.stored and items[use.weight].sites == items[other.weight].sites


def _uses_of_input(node: fx.Node, item: FrameInput, held: Mapping[int, Set[fx.Node]]) -> list[Use]:
    """The uses of one input, the weight itself or what was made of it. `held`: the inputs that a
    module holds beside its weight, by the module's identity."""
    derived = item.derived
    if derived is None and any(site.eligible.kind == "conv" for site in item.sites):
        return convolution_uses(node)
    if derived is None and (item.part or fake_value(node).dim() != 2):
        reason = f"{item.label} is how it is stored, and this use is outside its module's call"
        return [
            Use("unknown", node, user, stored=True, reason=reason)
            for user in node.users
            if isinstance(fake_value(user), torch.Tensor) or fake_value(user) is None
        ]
    if derived is None:
        transposed = any(site.eligible.transposed for site in item.sites)
        modules = {id(site.module) for site in item.sites}
        scales = {other for module in modules for other in held.get(module, ())}
        return uses_of(node, transposed=transposed, scales=scales)
    if derived.form is not None:
        return uses_of(node, transposed=False, part=(derived.form, derived.shape))
    reason = (
        f"{item.label} holds its values in an order, scale or precision that no rule "
        "covers; keep views of the weight, or copies of its rows"
    )
    return [Use("unknown", node, user, reason=reason) for user in node.users]


def _joined(ctx: Context, use: Use, other: Use) -> Use:
    """A use at whose node another weight enters too: (W + ΔW)(V + ΔV) is not two deltas."""
    if use.kind == "unknown":
        return use
    label = ctx.frame.by_node[other.weight].label
    return Use("unknown", use.weight, use.node, reason=f"it is multiplied by {label}")


def _mark_follows(ctx: Context, site: Site, use: Use) -> bool:
    """True where the use is part of a running call of the module, whose mark adds the delta to
    what it returns, in a graph that follows.

    Right only where the module returns x Wᵀ itself; otherwise LoRA is refused.
    """
    frame = ctx.frame
    inside = id(site.module) in frame.callers
    frame.inside[frame.positions[use.weight], frame.by_node[use.weight].sites.index(site)] = inside
    if inside and _forward_unknown(site):
        ctx.refuse(_compiled_apart(site))
    return inside


def _forward_unknown(site: Site) -> bool:
    """Whether the module may return something else than x Wᵀ, and no handler says what."""
    return site.has_own_forward and site.eligible.handler is None


def _left_to_mark(ctx: Context, use: Use) -> Site | None:
    """The site whose mark adds this use's delta, wherever the mark stands, if the use is made by a
    call of its module: it has a handler, or its weight is stored in a format (int8 and a scale) of
    which only the module's call as a whole is known to compute x Wᵀ."""
    item = ctx.frame.by_node[use.weight]
    for site in item.sites:
        stored = bool(item.part) or _is_stored(use) or is_stored(site.module, site.eligible)
        if not stored and site.eligible.handler is None:
            continue
        # Where a break cuts its call in two, its mark stands in a later graph.
        running = stored and id(site.module) in ctx.frame.callers
        if running or ctx.inside(use.node, site.module):
            return site
    return None


def _is_stored(use: Use) -> bool:
    """Whether the tensor holds W in some format, in place of W's own numbers."""
    return not is_dense(fake_value(use.weight))


def _used_before(site: Site) -> Refusal:
    return Refusal(
        (site,),
        "always",
        "its weight is also used outside its own call, where the delta is added, and its "
        "handler adds it to that result again",
    )


def _compiled_apart(site: Site) -> Refusal:
    return Refusal(
        (site,),
        "always",
        "its class overrides forward, and a graph break puts the forward and the mark into "
        "separate graphs",
    )


def _owner(ctx: Context, use: Use) -> Site | Refusal | None:
    """The site that an unmarked use belongs to; None where it belongs to a module not selected."""
    sites = ctx.frame.by_node[use.weight].sites
    if use.kind == "unknown":
        unknown = ctx.unknown_use(use.weight, use.node, use.reason)
        return None if ctx.made_by_other_owner(use.node, use.weight) else unknown
    where = ctx.where(use.node)
    if use.stored:
        dtype = fake_value(use.weight).dtype
        return Refusal(sites, "always", f"its weight ({dtype}) is used outside its call{where}")
    kind = USE_KINDS[use.kind]
    fitting = [site for site in sites if site.eligible.kind == kind]
    if use.kind == "conv" and (other := other_arithmetic(fitting[0], use)) is not None:
        return other
    unselected = ctx.unselected_owners(use.weight, kind)
    if len(fitting) == 1 and not unselected:
        return fitting[0]
    inside = [site for site in fitting if ctx.inside(use.node, site.module)]
    if len(inside) == 1:
        return inside[0]
    if unselected and (not fitting or any(ctx.inside(use.node, module) for module in unselected)):
        return None
    if not fitting and ctx.made_by_other_owner(use.node, use.weight):
        return None
    if not fitting:
        return Refusal(
            sites, "always", f"its weight is used as a {kind}, and its class is not one{where}"
        )
    return Refusal(
        tuple(fitting), "always", f"several modules share the weight of this {kind}{where}"
    )


def _insert(graph: fx.Graph, ctx: Context, site: Site, use: Use) -> None:
    """Put the site's op at the use: y' = site(x, y). Its bank is looked up by the weight at run
    time, since no hook brought it into the graph as an input."""
    assert use.x is not None
    bank = ctx.bank_inputs(graph, site, use.weight)
    own = ctx.own_inputs(graph, site, use.weight)
    by_column = ctx.by_column_inputs(graph, site, use.weight)
    gains = by_column["gains"]
    y = use.node
    users = list(y.users)
    with graph.inserting_before(y.next):
        x_rows, y_rows = use.x, y
        if use.swapped:
            x_rows, y_rows = _swapped(graph, ctx, use.x), _swapped(graph, ctx, y)
        call = {**bank, "y": y_rows, "rows": UNPROVED}
        ranges = own_ranges(site)._asdict()
        if use.kind == "embedding":
            arguments = in_order(EMBEDDING_OP, call, ids=x_rows, gains=gains, **own)
            node = ctx.call(graph, EMBEDDING_OP, arguments)
        elif use.kind == "conv":
            node = insert_conv_site(graph, ctx, use, {**call, **by_column})
        elif use.blocks is None:
            arguments = in_order(SITE_OP, call, x=x_rows, **by_column, **ranges, **own)
            if own:
                check_addends(ctx, site, [] if use.bias is None else [use.bias])
            node = ctx.call(graph, SITE_OP, arguments)
        else:
            if gains is not None:
                ctx.refuse(Refusal((site,), "dora", "its weight is used in blocks"))
            if own:
                ctx.refuse(Refusal((site,), "own", "its weight is used in blocks"))
            if by_column["shifts"] is not None:
                ctx.refuse(Refusal((site,), "bias", "its weight is used in blocks"))
            blocks = use.blocks._asdict()
            arguments = in_order(GROUPED_OP, call, x=x_rows, group_dim=0, **ranges, **blocks)
            node = ctx.call(graph, GROUPED_OP, arguments)
        last = _swapped(graph, ctx, node) if use.swapped else node
    if _rescales(node) and use.bias is not None:
        _leave_alone(graph, ctx, site, node, [use.bias])
    for user in users:
        user.replace_input_with(y, last)
    ctx.record(site, node, use, form="rewritten")


def _rescales(node: fx.Node) -> bool:
    """Whether this is the op of a linear, or a convolution, with room for DoRA."""
    return node.target in (SITE_OP, CONV_OP) and bound(node)["gains"] is not None


def _leave_alone(
    graph: fx.Graph, ctx: Context, site: Site, node: fx.Node, addends: list[fx.Node]
) -> None:
    """Give the site's op the sum of what stands beside the product in y; DoRA is not of that."""
    if any(size != 1 for item in addends for size in fake_value(item).shape[:-1]):
        ctx.refuse(
            Refusal(
                (site,), "dora", "more than a bias is added in the same operator as its product"
            )
        )
        return
    total = None
    with graph.inserting_before(node):
        for item in addends:
            total = item if total is None else ctx.call(graph, aten.add.Tensor, (total, item))
    rebind(node, addend=total)


def _swapped(graph: fx.Graph, ctx: Context, node: fx.Node) -> fx.Node:
    """`node` with its last two dimensions swapped."""
    dims = list(range(fake_value(node).dim()))
    dims[-1], dims[-2] = dims[-2], dims[-1]
    return ctx.call(graph, aten.permute.default, (node, dims))
