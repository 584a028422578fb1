"""Sites that a graph seems to compute with something other than their weight.

A tensor that was made from a weight is mostly recognised by its values (lorafx.program.derived).
Products of two weights, other formats and weights whose numbers cannot be read leave no such trace.
What remains visible is a linear that nothing uses, in a module that runs and multiplies by tensors
of its own.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import fx, nn

from lorafx.graph.context import Context, Refusal
from lorafx.graph.graph_nodes import plain_path
from lorafx.program.derived import has_numbers, is_near
from lorafx.program.frame import fake_value


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
    identities, paths = _running(graph)
    for site in program.sites:
        if site.path in program.reached or site.eligible.kind != "linear":
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
                yield Refusal(
                    (site,),
                    "always",
                    f"nothing uses its weight, but {near or 'the model'} computes with "
                    f"{holder}, which may have been made from it",
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
