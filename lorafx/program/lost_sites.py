"""Sites whose deltas a graph would lose, and why."""

from __future__ import annotations

from collections.abc import Iterator, Set

import torch
from torch import Tensor, fx

from lorafx.model.sites import Site
from lorafx.ownership.contractions import PRODUCTS
from lorafx.ownership.flow import place, plain_path
from lorafx.ownership.propagate import called_by
from lorafx.program.context import (
    Context,
    Refusal,
)
from lorafx.program.derived import replaces
from lorafx.program.frame import fake_value
from lorafx.program.inputs import FrameInput
from lorafx.program.weight_uses import SITE_KINDS

aten = torch.ops.aten
_PRODUCTS = {*PRODUCTS, aten.linear, aten.embedding, aten.convolution}
_OTHER_WEIGHT = "its module is called with another weight, in a transform of torch.func"


def replaced_sites(ctx: Context, in_parts: Set[Site]) -> Iterator[Refusal]:
    """Refusals of sites that this graph seems to compute without their weight.

    No graph has used the site yet, or this one uses only parts of its weight (`in_parts`), and its
    parent computes with another tensor (`replaces`).
    """
    frame, program = ctx.frame, ctx.program
    states = [(n, item) for n, item in frame.by_node.items() if _is_shared(item) and n.users]
    if not states:
        return
    identities, paths = _running_modules(ctx.graph)
    for site in program.sites:
        if site.path in program.reached and site not in in_parts:
            continue
        near = site.path.rpartition(".")[0]
        parent = program.graph.at(near)
        if parent is program.model:
            runs = frame.begins_call
        else:  # the whole forward: a later graph may use the weight if only a part runs here
            runs = str(id(parent)) in identities or near in paths
            runs = runs and id(parent) not in frame.callers
        if not runs:
            continue
        for node, item in states:
            value, holder = fake_value(node), item.holder
            tensor = value if holder is None else holder.tensor
            if replaces(site, near, tensor, value, holder):
                program.reached.add(site.path)
                program.replaced.add(site.path)
                parts = site in in_parts
                used = "parts of its weight are used" if parts else "nothing uses its weight"
                yield Refusal(
                    (site,),
                    "always",
                    f"{used}, but {near or 'the model'} computes with {item.label}, which may "
                    "have been made from it",
                )
                break


def lost_calls(ctx: Context, seen: Set[Site]) -> Iterator[Refusal]:
    """Refusals of sites whose modules are called here without their weight or mark, such as by
    `torch.func.functional_call` under `vmap`."""
    identities, _ = _running_modules(ctx.graph)
    for site in ctx.program.sites:
        called = str(id(site.module)) in identities and id(site.module) not in ctx.frame.callers
        plain = site.eligible.kind in SITE_KINDS.values() and not site.has_own_forward
        if not called or not plain or site in seen:
            continue
        if any(_multiplies(node) and ctx.inside(node, site.module) for node in ctx.graph.nodes):
            yield Refusal((site,), "always", _OTHER_WEIGHT)


def _is_shared(item: FrameInput) -> bool:
    """Whether it is a tensor of the model, such as one in a dict, which counts as a result."""
    role = item.role
    if item.kind != "result" or role is None:
        return item.kind == "state"
    return role.dim is None and role.request is None


def _multiplies(node: fx.Node) -> bool:
    return node.op == "call_function" and called_by(node) in _PRODUCTS


def constant_weights(ctx: Context) -> Iterator[Refusal]:
    """Refusals of sites whose weights Python has read, so that their values are constants here."""
    for node in ctx.graph.find_nodes(op="get_attr"):
        value = getattr(ctx.graph_module, str(node.target), None)
        derived = ctx.program.derived.look(value) if isinstance(value, Tensor) else None
        if derived is not None:
            reason = f"its values were read, and are constants of the graph ({place(node)})"
            yield Refusal(derived.sites, "always", reason)


def _running_modules(graph: fx.Graph) -> tuple[set[str], set[str]]:
    """Ids, as text, and paths of the modules whose forwards made the graph's nodes."""
    stacks = (node.meta.get("nn_module_stack") or {} for node in graph.nodes)
    entries = {(str(key).partition("@")[0], path) for s in stacks for key, (path, _) in s.items()}
    return {name for name, _ in entries}, {plain_path(path) for _, path in entries}
