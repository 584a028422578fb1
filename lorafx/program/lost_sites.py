"""Sites whose deltas a graph would lose, and why."""

from __future__ import annotations

from collections.abc import Iterator, Set

import torch
from torch import Tensor, fx

from lorafx.model.quantized import is_stored
from lorafx.model.sites import Site
from lorafx.ownership.contractions import PRODUCTS
from lorafx.ownership.flow import place, plain_path
from lorafx.ownership.propagate import called_by
from lorafx.program.context import Context
from lorafx.program.derived import HeldTensor, replacement
from lorafx.program.frame import fake_value
from lorafx.program.inputs import FrameInput
from lorafx.program.refusals import Refusal
from lorafx.program.weight_uses import SITE_KINDS

aten = torch.ops.aten
_PRODUCTS = {*PRODUCTS, aten.linear, aten.embedding, aten.convolution}
_OTHER_WEIGHT = (
    "its module multiplies by a weight other than its own, such as one that "
    "torch.func.functional_call gives it"
)


def replaced_sites(ctx: Context, in_parts: Set[Site]) -> Iterator[Refusal]:
    """Refusals of sites that this graph seems to compute without their weight.

    No graph has used the site yet, or this one uses only parts of its weight (`in_parts`), and its
    parent computes with another tensor (`replacement`).
    """
    frame, program = ctx.frame, ctx.program
    states = [_held(n, item) for n, item in frame.by_node.items() if n.users and _is_shared(item)]
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
        reason = replacement(site, near, states, in_parts=site in in_parts)
        if reason is not None:
            program.reached.add(site.path)
            program.replaced.add(site.path)
            yield Refusal((site,), "always", reason)


def _held(node: fx.Node, item: FrameInput) -> HeldTensor:
    value, holder = fake_value(node), item.holder
    return HeldTensor(value if holder is None else holder.tensor, value, holder, item.label)


def lost_calls(ctx: Context, marked: Set[Site], used: Set[Site]) -> Iterator[Refusal]:
    """Refusals of sites whose modules multiply here by another weight than their own, none of which
    is `used`: in `torch.func.functional_call`, or by what a forward puts in its place."""
    identities, _ = _running_modules(ctx.graph)
    for site in ctx.program.sites:
        called = str(id(site.module)) in identities and id(site.module) not in ctx.frame.callers
        entry, own = site.eligible, site.has_own_forward
        dense = entry.handler is None and not is_stored(site.module, entry)
        plain = dense and entry.kind in SITE_KINDS.values() and (site in marked or not own)
        if not called or not plain or site in used:
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
