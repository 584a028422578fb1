"""Candidates for repeats: the stretches of a graph that a module's call left in it.

The nodes of a module call are adjacent and name their calls (`nn_module_stack`). Nodes added by
passes belong to the stretch around them. A stretch is contiguous in an order of definition before
use, hence convex: no path leaves it and comes back.
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
from lorafx.program.frame import fake_value
from lorafx.torch_internals.operators import OpOverload

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
            continue  # part of the run if that continues
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
    """Whether it is an attention tagged as random for dropout, with probability 0."""
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
    """The graphs in the graph's attributes, by name: outlined layers, branches."""
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
