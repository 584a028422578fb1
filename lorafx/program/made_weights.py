"""Uses of a weight that a hook or a parametrisation computes, outside of its module's call.

Only the module's mark adds a delta there: what the graph computes of the weight's own tensors is
followed to where it meets data of the call, which has to be in the module's forward.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, fx

from lorafx.model.made_weights import maker_of, raw_tensors
from lorafx.model.sites import Site
from lorafx.ownership.flow import place
from lorafx.program.context import Context, Refusal
from lorafx.program.frame import fake_value


def made_outside(ctx: Context) -> Iterator[Refusal]:
    """The refusals of sites whose computed weight is used outside of their module's call."""
    items = ctx.frame.by_node
    sites = {id(tensor): site for site, _ in made_sites(ctx) for tensor in _raw(site)}
    if not sites:
        return
    made: dict[fx.Node, set[Site]] = {}
    given = ("state", "weight", "packed")
    for node in ctx.graph.nodes:
        if node.op == "placeholder":
            item = items.get(node)
            if item is not None and item.kind in given:
                site = None if item.holder is None else sites.get(id(item.holder.tensor))
                made[node] = set() if site is None else {site}
            continue
        inputs = node.all_input_nodes
        of = set().union(*(made.get(item, ()) for item in inputs))
        if node.op != "output" and all(item in made for item in inputs):
            made[node] = of
            continue
        for site in of:
            maker = maker_of(site.module, site.eligible.weight)
            returned = node.op == "output" and not _returns(node, site, made)
            if returned or (node.op == "output" and maker == "a hook"):
                continue  # a hook leaves it on the module, where later graphs know it
            if node.op == "output" or not ctx.inside(node, site.module):
                yield Refusal(
                    (site,),
                    "always",
                    f"{maker} computes its weight, which is used outside of its call "
                    f"({place(node)}); call the module there, or make the weight a parameter",
                )


def made_sites(ctx: Context) -> Iterator[tuple[Site, str]]:
    """The sites whose weight is computed, and by what."""
    for site in ctx.program.sites:
        if maker := maker_of(site.module, site.eligible.weight):
            yield site, maker


def _raw(site: Site) -> list[Tensor]:
    return raw_tensors(site.module, site.eligible.weight)


def _returns(output: fx.Node, site: Site, made: dict[fx.Node, set[Site]]) -> bool:
    """Whether a result is as large as the site's weight, not one of the numbers kept beside it."""
    size = site.in_features * site.out_features
    values = [fake_value(node) for node in output.all_input_nodes if site in made.get(node, ())]
    return any(isinstance(value, Tensor) and value.numel() == size for value in values)
