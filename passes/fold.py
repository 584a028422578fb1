"""Repeated layers are traced once by AOTAutograd, which takes a third of the time to compile one.

    h1 = layer(h0, W0); h2 = layer(h1, W1); ...
    →   h1, = layer_end([layer(layer_begin(h0), W0)]); h2, = layer_again([h1, W1], [h1]); ...

Layers are stretches of equal canonical form in Dynamo's graph (lorafx.program.regions): the same
calls with the same constants, on operands of equal sizes. So AOTAutograd would make the same nodes
of them. `unfold` puts these in.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from lorafx.kernels.ops.layer_ops import LAYER_AGAIN, LAYER_BEGIN, LAYER_END
from lorafx.program.context import COPIED, Context
from lorafx.program.frame import Frame, fake_value
from lorafx.program.isomorphism import Stretch
from lorafx.program.regions import repeats
from lorafx.torch_internals.graph_parts import FakeTensor, tree_leaves


@dataclass(frozen=True)
class Fold:
    """Repeated layers are traced once.

    Repeats below `min_nodes` are unchanged: they are too short to save anything.
    """

    name: str = "fold"
    required: bool = False
    min_nodes: int = 16

    def run(self, gm: fx.GraphModule, ctx: Context) -> int:
        if not ctx.program.runtime.active:  # then the graph is the base's, which torch compiles
            return 0
        claimed: set[fx.Node] = set()
        replaced: dict[fx.Node, fx.Node] = {}
        edits = 0
        for regions, stretches in repeats(gm, claimed, self.min_nodes):
            results = _leaving(stretches)
            if _is_possible(stretches, results):
                if ctx.frame.whole is None:
                    ctx.frame.whole = copy.deepcopy(gm.graph)
                _fold(gm.graph, stretches, results, replaced, len(ctx.frame.folded))
                ctx.frame.folded.append([*map(_origins, stretches)])
                claimed.update(node for region in regions for node in region.nodes)
                edits += 1
        return edits


def undo(gm: fx.GraphModule, frame: Frame) -> None:
    """Make the graph what it was before. Its inputs stay, since Dynamo has notes there."""
    assert frame.whole is not None
    inputs = gm.graph.find_nodes(op="placeholder")
    for node in reversed(gm.graph.nodes):
        if node.op != "placeholder":
            gm.graph.erase_node(node)
    copies = dict(zip(frame.whole.find_nodes(op="placeholder"), inputs, strict=True))
    gm.graph.output(gm.graph.graph_copy(frame.whole, copies))
    gm.recompile()
    frame.folded = []


def _leaving(stretches: Sequence[Stretch]) -> list[int]:
    """The positions of the nodes that others than those of a stretch use."""
    leaving: set[int] = set()
    for stretch in stretches:
        inside = set(stretch.nodes)
        for position, node in enumerate(stretch.nodes):
            if not inside.issuperset(node.users):
                leaving.add(position)
    return sorted(leaving)


def _is_possible(stretches: Sequence[Stretch], results: Sequence[int]) -> bool:
    """Whether ops can stand for these stretches: what goes in and out is strided tensors, of which
    none that comes out shares memory with another, or numbers; no result has a gradient. Numbers
    that AOTAutograd knows of an operand, as of `torch.tensor(2)`, are those of all stretches."""
    for own in zip(*(stretch.operands for stretch in stretches), strict=True):
        if len({*own}) > 1 and any(_is_constant(fake_value(node)) for node in own):
            return False
    for stretch in stretches:
        operands = [fake_value(node) for node in stretch.operands]
        leaving = [fake_value(stretch.nodes[position]) for position in results]
        if not all(map(_is_plain, (*operands, *leaving))) or _begins(stretch) is None:
            return False
        tensors = [value for value in leaving if isinstance(value, Tensor)]
        taken = {_memory(value) for value in operands if isinstance(value, Tensor)}
        made = {_memory(value) for value in tensors}
        if len(made) < len(tensors) or not tensors or made & taken:
            return False
        if any(value.requires_grad for value in tensors):
            return False
    return True


def _is_plain(value: object) -> bool:
    if isinstance(value, Tensor):  # those of torch.func are no fake ones
        is_strided = isinstance(value, FakeTensor) and value.layout is torch.strided
        return is_strided and not (value.is_conj() or value.is_neg())  # the ops' results are not
    return not any(isinstance(leaf, Tensor) for leaf in tree_leaves(value))


def _is_constant(value: object) -> bool:
    return isinstance(value, FakeTensor) and value.constant is not None


def _memory(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _begins(stretch: Stretch) -> fx.Node | None:
    """The first operand that is computed."""
    for node in stretch.operands:
        if node.op not in ("placeholder", "get_attr") and isinstance(fake_value(node), Tensor):
            return node
    return None


def _origins(stretch: Stretch) -> list[list[object]]:
    return [[node.meta.get(name) for name in COPIED] for node in stretch.nodes]


def _fold(
    graph: fx.Graph,
    stretches: Sequence[Stretch],
    results: Sequence[int],
    replaced: dict[fx.Node, fx.Node],
    layer: int,
) -> None:
    first, *others = stretches
    tensors = [p for p in results if isinstance(fake_value(first.nodes[p]), Tensor)]
    inside = set(first.nodes)
    x = _begins(first)
    assert x is not None
    x = replaced.get(x, x)
    operands = _tensors(first, replaced)
    with graph.inserting_before(first.nodes[0]):
        begin = graph.call_function(LAYER_BEGIN, (x, operands, layer))
        begin.meta = dict(x.meta)
    x.replace_all_uses_with(begin, delete_user_cb=inside.__contains__)
    given = [first.nodes[position] for position in tensors]
    left = [begin if node is x else node for node in operands]
    with graph.inserting_after(first.nodes[-1]):
        end = graph.call_function(LAYER_END, (given, left, layer))
    items = _items(graph, end, given)
    for node, item in zip(given, items, strict=True):
        outside = {*node.users} - inside - {end}
        node.replace_all_uses_with(item, delete_user_cb=outside.__contains__)
        replaced[node] = item
    for repeat, stretch in enumerate(others):
        with graph.inserting_before(stretch.nodes[0]):
            taken = _tensors(stretch, replaced)
            again = graph.call_function(LAYER_AGAIN, (taken, items, layer, repeat))
        mine = [stretch.nodes[position] for position in tensors]
        values = dict(zip(mine, _items(graph, again, mine), strict=True))
        for position in set(results).difference(tensors):  # sizes, which are equal
            values[stretch.nodes[position]] = first.nodes[position]
        for node, item in values.items():
            node.replace_all_uses_with(item)
            replaced[node] = item
        for node in reversed(stretch.nodes):
            graph.erase_node(node)


def _tensors(stretch: Stretch, replaced: dict[fx.Node, fx.Node]) -> list[fx.Node]:
    nodes = [node for node in stretch.operands if isinstance(fake_value(node), Tensor)]
    return [replaced.get(node, node) for node in nodes]


def _items(graph: fx.Graph, call: fx.Node, like: Sequence[fx.Node]) -> list[fx.Node]:
    items: list[fx.Node] = []
    with graph.inserting_after(call):
        for index in reversed(range(len(like))):
            item = graph.call_function(operator.getitem, (call, index))
            item.meta = dict(like[index].meta)
            items.insert(0, item)
    return items
