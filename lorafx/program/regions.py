"""Which stretches of a graph are calls of modules, and which of them compute the same.

Candidates are stretches of adjacent nodes that name one module call (`nn_module_stack`); nodes of
passes belong to the stretch around them. A stretch is contiguous in an order of definition before
use, hence convex: no path leaves it and comes back. Stretches of equal canonical form
(lorafx.program.isomorphism) repeat one another. Graphs are Dynamo's or AOTAutograd's.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from lorafx.op_arguments import base_of, bound
from lorafx.program.attention_nodes import writes_caches
from lorafx.program.isomorphism import CanonicalForm, Stretch, agree, sizes_of, stretch_of
from lorafx.torch_internals.graph_parts import OpOverload

aten = torch.ops.aten


@dataclass(frozen=True, eq=False)
class Region:
    """The nodes of a module call, or of a part between two barriers; `path` is for messages."""

    path: str
    nodes: tuple[fx.Node, ...]


def regions_of(graph: fx.Graph) -> list[Region]:
    """All regions of the graph, including nested ones, longest first, then in graph order."""
    nodes = [node for node in graph.nodes if node.op not in ("placeholder", "output")]
    barriers = _barriers(nodes)
    stacks = [() if node in barriers else _stack(node) for node in nodes]
    regions: dict[tuple[int, int], Region] = {}
    for depth in range(1, max((len(stack) for stack in stacks), default=0) + 1):
        for first, last in _runs(nodes, stacks, barriers, depth):
            path = str(nodes[first].meta["nn_module_stack"][stacks[first][depth - 1]][0])
            regions.setdefault((first, last), Region(path, tuple(nodes[first : last + 1])))
    ordered = sorted(regions, key=lambda ends: (ends[0] - ends[1], ends[0]))
    return [regions[ends] for ends in ordered]


def _runs(
    nodes: Sequence[fx.Node], stacks: Sequence[tuple[Any, ...]], barriers: set[fx.Node], depth: int
) -> Iterator[tuple[int, int]]:
    call: tuple[Any, ...] = ()
    first = last = -1
    for index, (node, stack) in enumerate(zip(nodes, stacks, strict=True)):
        if not stack and node not in barriers:
            continue  # nodes without a call do not end a run
        here = stack[:depth] if len(stack) >= depth else ()
        if here and here == call:
            last = index
            continue
        if call:
            yield first, last
        call, first, last = here, index, index
    if call:
        yield first, last


def _stack(node: fx.Node) -> tuple[Any, ...]:
    return tuple(node.meta.get("nn_module_stack") or ())


def _barriers(nodes: Sequence[fx.Node]) -> set[fx.Node]:
    """Nodes that cannot move: mutations, random numbers, assertions, and values written back into
    inputs. Assignments to items, in Dynamo's graphs, belong to their layer."""
    barriers: set[fx.Node] = set()
    # torch's lookups of an operator are slow, and a graph has few operators.
    pure: set[Any] = set()
    for node in nodes:
        if node.op != "call_function" or node.target in pure or node.target is operator.setitem:
            continue
        if not _has_effect(node):
            if isinstance(node.target, OpOverload):
                pure.add(node.target)
        elif not is_pure(node):
            barriers.add(node)
            # A body takes tensors, not tuples, so a barrier's results are unpacked outside of it.
            barriers.update(user for user in node.users if user.target is operator.getitem)
            if node.target is aten.copy_.default:
                barriers.add(base_of(bound(node)["src"]))
    return barriers


def is_pure(node: fx.Node) -> bool:
    """Whether `node` neither mutates, nor draws random numbers, nor has another effect."""
    return node.op == "get_attr" or not _has_effect(node) or _is_without_dropout(node)


def _has_effect(node: fx.Node) -> bool:
    return node.is_impure() or mutates(node)


def _is_without_dropout(node: fx.Node) -> bool:
    """Whether `node` is attention, which torch tags as random, with a dropout probability of 0."""
    return hasattr(node.target, "_schema") and bound(node).get("dropout_p", 1) == 0


def mutates(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is not None and schema.is_mutable


def repeats(
    gm: fx.GraphModule, claimed: set[fx.Node], least: int
) -> Iterator[tuple[tuple[Region, ...], tuple[Stretch, ...]]]:
    """Isomorphic regions of `least` nodes or more, longest first, that are not `claimed`."""
    # The key counts of two kinds of layers over a paged cache may be equal in this step only.
    sizes = {} if writes_caches(gm) else sizes_of(gm.graph)
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
