"""The layers that `fold` left out get the nodes that AOTAutograd made of the first one like them.

    layer_begin(x) ▶ n_0 ... n_k ▶ layer_end    →    n_0 ... n_k
    layer_again(operands)                       →    n_0 ... n_k, on these operands

What stands between the two ops is the layer, since AOTAutograd runs one node after another. Sizes
are taken from the first layer, to which they are equal.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx

from lorafx.kernels.ops.layer_ops import LAYER_AGAIN, LAYER_BEGIN, LAYER_END
from lorafx.program.context import Context
from lorafx.program.frame import fake_value
from lorafx.program.regions import is_pure
from lorafx.torch_internals.graph_parts import tree_leaves, tree_map_only

_CALLS = "nn_module_stack"


@dataclass(frozen=True)
class Unfold:
    """Layers that were left out are put in."""

    name: str = "unfold"
    required: bool = True

    def run(self, gm: fx.GraphModule, ctx: Context) -> int:
        edits = 0
        for layer in _layers(gm.graph):
            _put_in(layer, ctx)
            edits += 1 + len(layer.again)
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


def _put_in(layer: _Layer, ctx: Context) -> None:
    given = _nodes(layer.end.args[0])
    first, *others = ctx.frame.folded[layer.number]
    assert ctx.fake_mode is not None
    with ctx.fake_mode:
        for again, calls in zip(layer.again, others, strict=True):
            copies = _copied(layer, again, dict(zip(map(_key, first), calls, strict=True)))
            _give(again, [copies[node] for node in given])
        values = _Values([(fake_value(layer.begin), fake_value(layer.x))])
        for node in layer.nodes:
            node.meta["val"] = tree_map_only(Tensor, values.known, fake_value(node))
    _give(layer.end, given)
    layer.begin.replace_all_uses_with(layer.x)
    ctx.graph.erase_node(layer.begin)


def _copied(layer: _Layer, again: fx.Node, calls: Mapping[Any, Any]) -> dict[fx.Node, fx.Node]:
    """Copies of the layer's nodes for a repeat, before its op. `calls` has the module calls of the
    repeat's nodes by those of the layer's."""
    copies = {node: partners[0] for node, partners in _partners(layer.taken, again).items()}
    values = _Values((fake_value(node), fake_value(copy)) for node, copy in copies.items())
    copies[layer.begin] = copies[layer.x]
    values.add(fake_value(layer.begin), fake_value(copies[layer.x]))
    with again.graph.inserting_before(again):
        for node in layer.nodes:
            if not _is_size(node):
                copy = again.graph.node_copy(node, lambda source: copies.get(source, source))
                copy.meta["val"] = tree_map_only(Tensor, values.of, fake_value(node))
                stack = calls.get(_key(node.meta.get(_CALLS)))
                if stack is not None:
                    copy.meta[_CALLS] = stack
                copies[node] = copy
    return copies


def _key(stack: Any) -> Any:
    return None if stack is None else tuple(stack.items())


def _give(call: fx.Node, results: Sequence[fx.Node]) -> None:
    """Let `results` take the place of what a call gives."""
    for item in [*call.users]:
        if item.target is operator.getitem:
            index: Any = item.args[1]
            item.replace_all_uses_with(results[index])
            call.graph.erase_node(item)
    call.graph.erase_node(call)


class _Values:
    """Fake tensors of a repeat by those of the layer: views of the same memory stay such."""

    def __init__(self, operands: Iterable[tuple[Any, Any]]) -> None:
        self._memory: dict[int, tuple[Tensor, Tensor]] = {}
        for value, partner in operands:
            self.add(value, partner)

    def add(self, value: Any, partner: Any) -> None:
        if isinstance(value, Tensor):
            self._memory.setdefault(value.untyped_storage()._cdata, (value, partner))

    def of(self, value: Tensor) -> Tensor:
        """The repeat's fake tensor that stands for this one of the layer."""
        if value.untyped_storage()._cdata in self._memory:
            return self.known(value)
        partner = value.new_empty_strided(value.size(), value.stride())
        self.add(value, partner)
        return partner

    def known(self, value: Tensor) -> Tensor:
        """`of` for a view of an operand; any other tensor itself."""
        base, partner = self._memory.get(value.untyped_storage()._cdata, (None, value))
        if base is None:
            return value
        offset = value.storage_offset() - base.storage_offset() + partner.storage_offset()
        if value.dtype is not partner.dtype:
            partner = partner.view(value.dtype)
        return partner.as_strided(value.size(), value.stride(), offset)
