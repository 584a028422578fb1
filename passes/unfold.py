"""The layers that `fold` left out get the nodes that AOTAutograd made of the first one like them.

    layer_begin(x) ▶ n_0 ... n_k ▶ layer_end    →    n_0 ... n_k
    layer_again(operands)                       →    n_0 ... n_k, on these operands

What stands between the two ops is the layer, since AOTAutograd runs one node after another. Sizes
are taken from the first layer, to which they are equal. Fake values of views are computed anew, so
that values share memory as they would without the two ops.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from lorafx.kernels.ops.layer_ops import LAYER_AGAIN, LAYER_BEGIN, LAYER_END
from lorafx.program.context import COPIED, Context
from lorafx.program.frame import fake_value
from lorafx.program.regions import is_pure
from lorafx.torch_internals.graph_parts import tree_leaves, tree_map_only


@dataclass(frozen=True)
class Unfold:
    """Layers that were left out are put in."""

    name: str = "unfold"
    required: bool = True

    def run(self, gm: fx.GraphModule, ctx: Context) -> int:
        edits, layers = 0, [*_layers(gm.graph)]
        if not layers:
            return 0
        views = _views_of_results(gm.graph, layers)
        repeated = [_views_in(layer) for layer in layers]
        assert ctx.fake_mode is not None
        with ctx.fake_mode:
            for layer, inside in zip(layers, repeated, strict=True):
                views |= _put_in(layer, inside, ctx)
                edits += 1 + len(layer.again)
            for node in gm.graph.nodes:
                if node in views:
                    args, kwargs = fx.node.map_arg((node.args, node.kwargs), fake_value)
                    node.meta["val"] = node.target(*args, **kwargs)
        return edits


@dataclass(frozen=True, eq=False)
class _Layer:
    """A layer's nodes, the ops around it, and those in the places of its repeats."""

    begin: fx.Node
    nodes: Sequence[fx.Node]
    end: fx.Node
    again: Sequence[fx.Node]

    @property
    def x(self) -> Any:
        return self.begin.args[0]

    @property
    def taken(self) -> list[fx.Node]:
        return _nodes(self.begin.args[1])

    @property
    def left(self) -> list[fx.Node]:
        return _nodes(self.end.args[1])

    @property
    def number(self) -> Any:
        return self.begin.args[2]


def can_unfold(graph: fx.Graph) -> bool:
    """Whether AOTAutograd's nodes of a layer can stand for its repeats: they read what the layer
    takes, write into nothing, have no other effect, and all that leaves them is what it gives."""
    for layer in _layers(graph):
        left = [layer.x if node is layer.begin else node for node in layer.left]
        inside = {*layer.nodes, layer.begin, layer.end, *layer.taken}
        if left != layer.taken:
            return False
        for again in layer.again:
            if any(len({*pairs}) > 1 for pairs in _partners(layer.taken, again).values()):
                return False
        for node in layer.nodes:
            sources = [source for source in node.all_input_nodes if not _is_size(source)]
            users = [] if _is_size(node) else node.users
            if not (is_pure(node) and inside.issuperset([*sources, *users])):
                return False
    return True


def _partners(taken: Sequence[fx.Node], again: fx.Node) -> dict[fx.Node, list[fx.Node]]:
    """The operands of a repeat, by that of the layer in their places."""
    partners: dict[fx.Node, list[fx.Node]] = {}
    for node, partner in zip(taken, _nodes(again.args[0]), strict=True):
        partners.setdefault(node, []).append(partner)
    return partners


def _layers(graph: fx.Graph) -> Iterator[_Layer]:
    ends = {node.args[2]: node for node in graph.find_nodes(op="call_function", target=LAYER_END)}
    again: dict[Any, list[fx.Node]] = {number: [] for number in ends}
    for node in graph.find_nodes(op="call_function", target=LAYER_AGAIN):
        again[node.args[2]].append(node)
    for begin in graph.find_nodes(op="call_function", target=LAYER_BEGIN):
        end, nodes, node = ends[begin.args[2]], list[fx.Node](), begin.next
        while node is not end:
            nodes.append(node)
            node = node.next
        yield _Layer(begin, nodes, end, again[begin.args[2]])


def _nodes(argument: Any) -> list[fx.Node]:
    return [*argument]


def _is_size(node: fx.Node) -> bool:
    """Whether a node gives numbers alone, which are equal in all repeats."""
    leaves = tree_leaves(fake_value(node))
    return bool(leaves) and not any(leaf is None or isinstance(leaf, Tensor) for leaf in leaves)


def _views_of_results(graph: fx.Graph, layers: Sequence[_Layer]) -> set[fx.Node]:
    """The nodes whose fake values share memory with what the ops give."""
    ops = [op for layer in layers for op in (layer.begin, layer.end, *layer.again)]
    given = {memory for op in ops for memory in _memory(op)}
    return {node for node in graph.nodes if node.op != "output" and given & _memory(node)}


def _views_in(layer: _Layer) -> set[fx.Node]:
    """The nodes of a layer that give views of its operands, or of earlier nodes' results."""
    seen = {memory for node in (layer.begin, *layer.taken) for memory in _memory(node)}
    views: set[fx.Node] = set()
    for node in layer.nodes:
        memory = _memory(node)
        if memory & seen:
            views.add(node)
        seen |= memory
    return views


def _memory(node: fx.Node) -> set[int]:
    leaves = tree_leaves(fake_value(node))
    return {leaf.untyped_storage()._cdata for leaf in leaves if _is_strided(leaf)}


def _is_strided(value: Any) -> bool:
    return isinstance(value, Tensor) and value.layout is torch.strided


def _put_in(layer: _Layer, views: set[fx.Node], ctx: Context) -> set[fx.Node]:
    """Put in the repeats of a layer, in which `views` give views; returns their copies."""
    given, copied = _nodes(layer.end.args[0]), set[fx.Node]()
    first, *others = ctx.frame.folded[layer.number]
    for again in layer.again:  # AOTAutograd leaves out those of which nothing is used
        number: Any = again.args[3]
        copies = _copied(layer, again, _origins(first, others[number]))
        copied |= {copies[node] for node in views if node in copies}
        _give(again, [copies[node] for node in given])
    _give(layer.end, given)
    layer.begin.replace_all_uses_with(layer.x)
    ctx.graph.erase_node(layer.begin)
    return copied


def _copied(layer: _Layer, again: fx.Node, origins: Mapping[Any, Any]) -> dict[fx.Node, fx.Node]:
    """Copies of the layer's nodes for a repeat, before its op."""
    copies = {node: partners[0] for node, partners in _partners(layer.taken, again).items()}
    copies[layer.begin] = copies[layer.x]
    with again.graph.inserting_before(again):
        for node in layer.nodes:
            if not _is_size(node):
                copy = again.graph.node_copy(node, lambda source: copies.get(source, source))
                copy.meta["val"] = tree_map_only(Tensor, _like, fake_value(node))
                for name in COPIED:
                    if (origin := origins.get(_key(node.meta.get(name)))) is not None:
                        copy.meta[name] = origin
                copies[node] = copy
    return copies


def _like(value: Tensor) -> Tensor:
    return value.new_empty_strided(value.size(), value.stride())


def _origins(first: Sequence[Any], other: Sequence[Any]) -> dict[Any, Any]:
    """The module calls and lines of a repeat by those of the layer."""
    return {
        _key(of_layer): of_repeat
        for origins in zip(first, other, strict=True)
        for of_layer, of_repeat in zip(*origins, strict=True)
    }


def _key(origin: Any) -> Any:
    return tuple(origin.items()) if isinstance(origin, Mapping) else origin


def _give(call: fx.Node, results: Sequence[fx.Node]) -> None:
    """Let `results` take the place of what a call gives."""
    for item in [*call.users]:
        if item.target is operator.getitem:
            index: Any = item.args[1]
            item.replace_all_uses_with(results[index])
            call.graph.erase_node(item)
    call.graph.erase_node(call)
