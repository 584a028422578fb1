"""Repeated layers are compiled once and called with their weights and banks.

    h1 = layer(h0; W0, bank0); h2 = layer(h1; W1, bank1); ...
    →   h1 = invoke_subgraph(body, h0, W0, bank0); h2 = invoke_subgraph(body, h1, W1, bank1); ...

Candidates are stretches of adjacent nodes that name one module call (`nn_module_stack`); nodes of
passes belong to the stretch around them. A stretch is contiguous in an order of definition before
use, hence convex: no path leaves it and comes back. Stretches of equal canonical form
(isomorphism.py) are merged. A body returns fresh tensors only, since a result that shares an
operand's memory would be overwritten with it; views are taken again behind the call.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import Tensor, fx

from lorafx.op_arguments import bound, operand
from lorafx.ownership.flow import plain_path
from lorafx.passes.outline.isomorphism import CanonicalForm, Stretch, agree, sizes_of, stretch_of
from lorafx.passes.write_in_place import writes_in_place
from lorafx.program.context import Context, Outlined
from lorafx.program.frame import fake_value
from lorafx.torch_internals.graph_parts import OpOverload, tree_leaves

aten = torch.ops.aten


_SIZES = frozenset({aten.sym_size.int, aten.sym_stride.int})
_SYMBOLIC = (torch.SymInt, torch.SymFloat, torch.SymBool, int, float, bool)


@dataclass(frozen=True, eq=False)
class Region:
    """The nodes of a module call, or of a part between two barriers; `path` is for messages."""

    path: str
    nodes: tuple[fx.Node, ...]


def regions_of(graph: fx.Graph) -> list[Region]:
    """All regions of the graph, also nested ones, longest first, then in graph order."""
    nodes = [node for node in graph.nodes if node.op not in ("placeholder", "output")]
    barriers = _barriers(nodes)
    stacks = [() if node in barriers else _stack(node) for node in nodes]
    found: dict[tuple[int, int], Region] = {}
    for depth in range(1, max((len(stack) for stack in stacks), default=0) + 1):
        for first, last in _runs(nodes, stacks, barriers, depth):
            path = str(nodes[first].meta["nn_module_stack"][stacks[first][depth - 1]][0])
            found.setdefault((first, last), Region(path, tuple(nodes[first : last + 1])))
    ordered = sorted(found, key=lambda ends: (ends[0] - ends[1], ends[0]))
    return [found[ends] for ends in ordered]


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
    """Immovable nodes: mutations, random numbers, assertions, and values written back into inputs.
    Assignments to items, in Dynamo's graphs, belong to their layer."""
    found: set[fx.Node] = set()
    # torch's lookups of an operator are slow, and a graph has few operators.
    pure: set[Any] = set()
    for node in nodes:
        if node.op != "call_function" or node.target in pure or node.target is operator.setitem:
            continue
        if not _has_effect(node):
            if isinstance(node.target, OpOverload):
                pure.add(node.target)
        elif not is_pure(node):
            found.add(node)
            # Calls take and return tensors, so a barrier's results are unpacked there.
            found.update(user for user in node.users if user.target is operator.getitem)
            if node.target is aten.copy_.default:
                source: Any = bound(node)["src"]
                while isinstance(source, fx.Node) and is_view(source):
                    source = operand(source)
                found.add(source)
    return found


def is_pure(node: fx.Node) -> bool:
    """Whether `node` neither mutates, nor draws random numbers, nor has another effect."""
    return node.op == "get_attr" or not _has_effect(node) or _drops_nothing(node)


def _has_effect(node: fx.Node) -> bool:
    return node.is_impure() or _mutates(node)


def _drops_nothing(node: fx.Node) -> bool:
    """Whether `node` is attention, which torch tags as random, with a dropout probability of 0."""
    return hasattr(node.target, "_schema") and bound(node).get("dropout_p", 1) == 0


def _mutates(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is not None and schema.is_mutable


def is_view(node: fx.Node) -> bool:
    """Whether the result may share its operand's memory, by schema."""
    if node.op != "call_function":
        return False
    if node.target is operator.getitem:
        return is_view(operand(node))
    schema = getattr(node.target, "_schema", None)
    return schema is not None and any(item.alias_info is not None for item in schema.returns)


def is_free(node: fx.Node) -> bool:
    """Whether recomputation costs nothing: views, sizes, constants."""
    return node.op == "get_attr" or is_view(node) or isinstance(fake_value(node), _SYMBOLIC)


def hoist_shared(graph: fx.Graph) -> int:
    """Move activation-independent values of several regions to the front; returns their number."""
    _settle_sizes(graph)
    invariant = _invariant(graph)
    wanted: set[fx.Node] = set()
    for region in regions_of(graph):
        inside = set(region.nodes)
        pending = [
            node
            for node in region.nodes
            if node in invariant and any(user not in inside for user in node.users)
        ]
        while pending:
            node = pending.pop()
            if node not in wanted and node.op != "placeholder":
                wanted.add(node)
                pending.extend(node.all_input_nodes)
    anchor = next(node for node in graph.nodes if node.op != "placeholder")
    for node in [node for node in graph.nodes if node in wanted]:
        node.meta.pop("nn_module_stack", None)  # belongs to no region any more
        if node is anchor:
            anchor = anchor.next
        else:
            anchor.prepend(node)
    return len(wanted)


def _settle_sizes(graph: fx.Graph) -> None:
    """Replace sizes of activations by numbers, or by expressions of size inputs."""
    known: dict[Any, fx.Node] = {}
    anchor = next(node for node in graph.nodes if node.op != "placeholder")
    for node in list(graph.nodes):
        value = fake_value(node)
        if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
            continue
        expr = value.node.expr if isinstance(value, torch.SymInt) else sympy.Integer(value)
        if node.op == "placeholder":
            known.setdefault(expr, node)
        elif node.target in _SIZES:
            with graph.inserting_before(anchor):
                size = _computed(graph, expr, known)
            if size is None:
                continue
            for user in list(node.users):
                _replace_argument(user, node, size)
            anchor = node.next if node is anchor else anchor
            graph.erase_node(node)


def _computed(graph: fx.Graph, expr: Any, known: dict[Any, fx.Node]) -> Any:
    """`expr` as a number or a node: a polynomial in size inputs; else None."""
    if expr.is_Integer:
        return int(expr)
    if expr not in known and isinstance(expr, (sympy.Add, sympy.Mul)):
        target = operator.add if isinstance(expr, sympy.Add) else operator.mul
        parts = [_computed(graph, part, known) for part in expr.args]
        if None in parts:
            return None
        total = parts[0]
        for part in parts[1:]:
            node = graph.call_function(target, (total, part))
            values = (fake_value(x) if isinstance(x, fx.Node) else x for x in (total, part))
            node.meta["val"] = target(*values)
            total = node
        known[expr] = total
    return known.get(expr)


def _replace_argument(user: fx.Node, old: fx.Node, new: Any) -> None:
    args = fx.node.map_arg((user.args, user.kwargs), lambda item: new if item is old else item)
    user.args, user.kwargs = args


def bodies(gm: fx.GraphModule) -> list[tuple[str, fx.GraphModule]]:
    """The graphs that `gm` reads as attributes, by name: outlined layers, branches."""
    names = {str(node.target) for node in gm.graph.nodes if node.op == "get_attr"}
    return [
        (name, module)
        for name, module in gm.named_children()
        if name in names and isinstance(module, fx.GraphModule)
    ]


def _invariant(graph: fx.Graph) -> set[fx.Node]:
    found: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "placeholder":
            value = fake_value(node)
            if not (isinstance(value, Tensor) and value.is_floating_point()):
                found.add(node)
        elif not is_pure(node):
            if node.op == "call_function" and _mutates(node):
                break  # later reads may see changes
        elif all(source in found for source in node.all_input_nodes):
            found.add(node)
    return found


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
    """Isomorphic regions of `least` nodes or more, longest first, that are not `claimed`."""
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
        originals = [node for node in nodes if fake_value(node).node._expr == symbol]
        found += originals[:1] or nodes
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
    inside = set(nodes)
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
        node.replace_all_uses_with(item, delete_user_cb=lambda user: user not in inside)
    replaced.update(new)
    for node in reversed(nodes):
        graph.erase_node(node)
    return call
