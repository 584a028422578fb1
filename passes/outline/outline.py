"""Repeated layers are compiled once and called with their weights and banks.

    h1 = layer(h0; W0, bank0); h2 = layer(h1; W1, bank1); ...
    →   h1 = invoke_subgraph(body, h0, W0, bank0); h2 = invoke_subgraph(body, h1, W1, bank1); ...

Candidates are the nodes of a module call (regions.py), merged if their canonical forms are equal
(isomorphism.py). A body returns fresh tensors only: readers outside take views again, since a
result that shares an operand's memory would be overwritten with it.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import fx

from lorafx.passes.outline.isomorphism import CanonicalForm, Stretch, agree, sizes_of, stretch_of
from lorafx.passes.outline.regions import Region, hoist_shared, is_free, regions_of
from lorafx.passes.write_in_place import writes_in_place
from lorafx.program.context import Context, Outlined, plain_path
from lorafx.program.frame import fake_value
from lorafx.torch_internals.trees import tree_leaves

INVOKE = torch.ops.higher_order.invoke_subgraph


@dataclass(frozen=True)
class Outline:
    """Repeated layers become calls of one body.

    Repeats below `min_nodes` stay: a call costs more, and prevents fusion across its ends.
    """

    name: str = "outline"
    required: bool = False
    min_nodes: int = 32

    def run(self, gm: fx.GraphModule, ctx: Context) -> int:
        hoist_shared(gm.graph)
        claimed: set[fx.Node] = set()
        replaced: dict[fx.Node, fx.Node] = {}
        edits = 0
        for regions, stretches in repeats(gm, claimed, self.min_nodes):
            members = [_Member.of(stretch) for stretch in stretches]
            if all(member.possible for member in members) and ctx.take_edit():
                name = f"{self.name}d_{edits}"
                _outline(gm, ctx, members, name, replaced)
                claimed.update(node for region in regions for node in region.nodes)
                paths = tuple(plain_path(region.path) for region in regions)
                ctx.outlined.append(Outlined(name, paths, len(regions[0].nodes)))
                edits += 1
        return edits


def repeats(
    gm: fx.GraphModule, claimed: set[fx.Node], least: int
) -> Iterator[tuple[tuple[Region, ...], tuple[Stretch, ...]]]:
    """Isomorphic regions of `least` nodes or more, longest first, beside the caller's `claimed`."""
    # Over a paged cache, equal lengths of two kinds of layers may differ in the next step.
    sizes = {} if writes_in_place(gm) else sizes_of(gm.graph)
    lengths: dict[int, list[Region]] = {}
    for region in regions_of(gm.graph):
        if len(region.nodes) >= least:
            lengths.setdefault(len(region.nodes), []).append(region)
    for candidates in lengths.values():
        groups: dict[CanonicalForm, list[tuple[Region, Stretch]]] = {}
        for region in candidates:
            if len(candidates) > 1 and claimed.isdisjoint(region.nodes):
                stretch = stretch_of(gm, region.nodes)
                groups.setdefault(stretch.form, []).append((region, stretch))
        for group in groups.values():
            while len(group) > 1:
                first = group[0][1]
                same = [item for item in group if agree(first, item[1], sizes)]
                group = [item for item in group if item not in same]
                if len(same) > 1:
                    regions, stretches = zip(*same, strict=True)
                    yield regions, stretches


@dataclass(frozen=True)
class _Member:
    """A stretch, indices of nodes whose values leave it, and nodes recomputed behind the call."""

    stretch: Stretch
    results: frozenset[int]
    again: tuple[fx.Node, ...]

    @classmethod
    def of(cls, stretch: Stretch) -> _Member:
        place = {node: index for index, node in enumerate(stretch.nodes)}
        results: set[int] = set()
        again: set[fx.Node] = set()
        pending = [n for n in stretch.nodes if any(user not in place for user in n.users)]
        while pending:
            node = pending.pop()
            if node not in place or node in again:
                continue
            if is_free(node):
                again.add(node)
                pending.extend(node.all_input_nodes)
            else:
                results.add(place[node])
        return cls(stretch, frozenset(results), tuple(n for n in stretch.nodes if n in again))

    @property
    def possible(self) -> bool:
        nodes = self.stretch.nodes
        return bool(self.results) and all(
            isinstance(fake_value(nodes[place]), torch.Tensor) for place in self.results
        )


def _outline(
    gm: fx.GraphModule,
    ctx: Context,
    members: Sequence[_Member],
    name: str,
    replaced: dict[fx.Node, fx.Node],
) -> None:
    first = members[0].stretch
    results = sorted(frozenset().union(*(member.results for member in members)))
    symbols = _symbols(gm.graph, first)
    taken = [replaced.get(node, node) for node in first.operands]
    body, inside = _body(gm, first.nodes, [*taken, *symbols], results)
    setattr(gm, name, body)
    with gm.graph.inserting_before(first.nodes[0]):
        attribute = gm.graph.get_attr(name)
    for member in members:
        operands = [replaced.get(node, node) for node in member.stretch.operands]
        call = _call(gm.graph, member, (attribute, name, *operands, *symbols), results, replaced)
        for node, twin in zip(member.stretch.nodes, first.nodes, strict=True):
            if node in ctx.states:
                ctx.homes[node] = (call, inside[twin])


def _symbols(graph: fx.Graph, stretch: Stretch) -> list[fx.Node]:
    needed = set()
    for node in (*stretch.nodes, *stretch.operands):
        for value in tree_leaves(fake_value(node)):
            sizes = (*value.shape, *value.stride()) if isinstance(value, torch.Tensor) else (value,)
            for size in sizes:
                if isinstance(size, torch.SymInt):
                    needed |= size.node.expr.free_symbols
    inputs: dict[sympy.Symbol, list[fx.Node]] = {}
    for node in graph.find_nodes(op="placeholder"):
        value = fake_value(node)
        if isinstance(value, torch.SymInt) and value.node.expr in needed:
            inputs.setdefault(value.node.expr, []).append(node)
    # The lengths of all layers' caches may share a symbol, but Inductor identifies inputs by their
    # original symbols: only the input that was this symbol is taken.
    found: list[fx.Node] = []
    for symbol, nodes in inputs.items():
        own = [node for node in nodes if fake_value(node).node._expr == symbol]
        found += own[:1] or nodes
    return [node for node in found if node not in stretch.operands]


def _body(
    gm: fx.GraphModule,
    nodes: Sequence[fx.Node],
    operands: Sequence[fx.Node],
    results: Sequence[int],
) -> tuple[fx.GraphModule, dict[fx.Node, fx.Node]]:
    graph = fx.Graph()
    inside: dict[fx.Node, fx.Node] = {}
    for node in operands:
        inside[node] = graph.placeholder(node.name)
        inside[node].meta["val"] = fake_value(node)
    for node in nodes:
        inside[node] = graph.node_copy(node, inside.__getitem__)
    graph.output(tuple(inside[nodes[place]] for place in results))
    return fx.GraphModule(gm, graph), inside


def _call(
    graph: fx.Graph,
    member: _Member,
    arguments: tuple[Any, ...],
    results: Sequence[int],
    replaced: dict[fx.Node, fx.Node],
) -> fx.Node:
    nodes = member.stretch.nodes
    own = set(nodes)
    with graph.inserting_before(nodes[0]):
        call = graph.call_function(INVOKE, arguments)
        call.meta["val"] = tuple(fake_value(nodes[place]) for place in results)
        new: dict[fx.Node, fx.Node] = {}
        for index, place in enumerate(results):
            if place in member.results:
                item = graph.call_function(operator.getitem, (call, index))
                item.meta["val"] = fake_value(nodes[place])
                new[nodes[place]] = item
        for node in member.again:
            new[node] = graph.node_copy(node, lambda source: new.get(source, source))
    for node, item in new.items():
        node.replace_all_uses_with(item, delete_user_cb=lambda user: user not in own)
    replaced.update(new)
    for node in reversed(nodes):
        graph.erase_node(node)
    return call
