"""Sites that a graph seems to compute by something else than their weight.

What was made of a weight is mostly known by what it holds (lorafx.derived). Products of two
weights, other formats and weights whose numbers cannot be read leave no such trace; what is left to
see is a linear that nothing uses, in a module that runs and multiplies by tensors of its own.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import fx, nn

from lorafx.context import Context, Refusal
from lorafx.derived import has_numbers, is_near
from lorafx.frame import fake_value


def replaced_sites(graph: fx.Graph, ctx: Context) -> Iterator[Refusal]:
    """Refusals of sites that this graph seems to compute by something else than their weight.

    No graph so far has used the site, and here a module that holds it runs with tensors of its own
    in place of it. For a weight whose numbers cannot be read any matrix will do; otherwise it takes
    an attribute or buffer with as many columns as the weight has inputs, since parameters of the
    module's own are common. What an earlier graph has computed with the site (keys and values of
    an encoder, kept for all decode steps) needs no second use.
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
    for site in program.sites:
        if site.path in program.reached or site.eligible.kind != "linear":
            continue
        parent = program.graph.parent(site.path) if site.path else None
        if parent is None or not _runs(graph, ctx, parent):
            continue
        readable = has_numbers(site)
        near = site.path.rpartition(".")[0]
        for node, holder in own:
            value = fake_value(node)
            alike = not isinstance(holder.tensor, nn.Parameter) and site.in_features in value.shape
            if is_near(str(holder), near) and (alike or not readable):
                program.reached.add(site.path)
                yield Refusal(
                    (site,),
                    "always",
                    f"nothing uses its weight, and {near or 'the model'} computes with {holder}, "
                    "which may have been made of it",
                )
                break


def _is_matrix(node: fx.Node) -> bool:
    value = fake_value(node)
    return bool(node.users) and value.dim() > 1 and value.is_floating_point()


def _runs(graph: fx.Graph, ctx: Context, module: nn.Module) -> bool:
    """Whether the graph holds a whole call of `module`, not a part of one that breaks apart."""
    if module is ctx.program.model and ctx.frame.begins_call:
        return True
    return id(module) not in ctx.frame.callers and any(
        ctx.inside(node, module) for node in graph.nodes if node.op == "call_function"
    )
