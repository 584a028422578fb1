"""Canonical forms: equal exactly for stretches that compute the same on other operands."""

from __future__ import annotations

import operator
from collections.abc import Callable

import pytest
import torch
from site_graphs import FakeGraph
from torch import Tensor, fx, nn
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from lorafx.program.isomorphism import Stretch, agree, sizes_of, stretch_of

pytestmark = pytest.mark.quick

aten = torch.ops.aten


class Graph(FakeGraph):
    def __init__(self) -> None:
        self.graph = fx.Graph()
        self.root = nn.Module()
        self.shapes = ShapeEnv(duck_shape=False)
        self.mode = FakeTensorMode(shape_env=self.shapes, allow_non_fake_inputs=True)
        self.inputs = 0

    def input(
        self, *shape: int, dtype: torch.dtype = torch.float32, symbolic: bool = False
    ) -> fx.Node:
        value = torch.empty(shape, dtype=dtype)
        if symbolic:
            torch._dynamo.mark_dynamic(value, 0)
        name = f"input{self.inputs}"
        self.inputs += 1
        node = self.graph.placeholder(name)
        node.meta["val"] = self.mode.from_tensor(
            value, static_shapes=not symbolic, source=ConstantSource(name)
        )
        return node

    def module(self) -> fx.GraphModule:
        return fx.GraphModule(self.root, self.graph)


#: (graph, which of two layers, the graph's inputs) to the layer's nodes
Layer = Callable[..., list[fx.Node]]


def pair(layer: Layer, *shapes: tuple[int, ...]) -> tuple[Stretch, Stretch]:
    """Stretches of `layer(graph, 0, *inputs)` and `layer(graph, 1, *inputs)` in one graph."""
    graph = Graph()
    return stretches(graph, layer, *(graph.input(*shape) for shape in shapes or ((4, 4), (4, 4))))


def stretches(graph: Graph, layer: Layer, *inputs: fx.Node) -> tuple[Stretch, Stretch]:
    nodes = [layer(graph, index, *inputs) for index in range(2)]
    graph.graph.output(tuple(part[-1] for part in nodes))
    gm = graph.module()
    return stretch_of(gm, nodes[0]), stretch_of(gm, nodes[1])


def linear_layer(graph: Graph, index: int, x: fx.Node, *weights: fx.Node) -> list[fx.Node]:
    """relu(x W_i) + x"""
    product = graph.call(aten.mm.default, x, weights[index])
    act = graph.call(aten.relu.default, product)
    return [product, act, graph.call(aten.add.Tensor, act, x)]


@pytest.mark.parametrize(("offset", "same"), [(0, True), (4, True), (1, False)])
def test_operands_that_vectors_cannot_be_loaded_from_are_told_apart(offset: int, same: bool):
    """16 bytes: a body is compiled for the operands of its first call."""
    graph = Graph()
    inputs = [graph.input(*shape) for shape in ((2, 4), (4, 4), (4, 4))]
    view = torch.empty(16 + offset)[offset:].view(4, 4)
    inputs[2].meta["val"] = graph.mode.from_tensor(view, static_shapes=True)
    first, second = stretches(graph, linear_layer, *inputs)
    assert (first.form == second.form) is same


def _constants(*values: Tensor) -> Layer:
    def layer(graph: Graph, index: int, x: fx.Node, _: fx.Node) -> list[fx.Node]:
        constant = graph.constant(f"constant{index}", values[index])
        return [constant, graph.call(aten.mul.Tensor, x, constant)]

    return layer


def _order(graph: Graph, index: int, x: fx.Node, _: fx.Node) -> list[fx.Node]:
    a, b = graph.call(aten.sin.default, x), graph.call(aten.cos.default, x)
    pair = (b, a) if index else (a, b)
    return [a, b, graph.call(aten.sub.Tensor, *pair)]


def _split(graph: Graph, index: int, x: fx.Node, _: fx.Node) -> list[fx.Node]:
    parts = graph.call(aten.split_with_sizes.default, x, [2, 2], -1)
    return [parts, graph.call(operator.getitem, parts, index)]


DIFFERENT = {
    "target": lambda g, i, x, _: [g.call((aten.sin, aten.cos)[i].default, x)],
    "literal": lambda g, i, x, _: [g.call(aten.mul.Tensor, x, (0.5, 0.25)[i])],
    "bool for an integer": lambda g, i, x, _: [g.call(aten.mul.Tensor, x, (True, 1)[i])],
    "dtype": lambda g, i, x, _: [
        g.call(torch.ops.prims.convert_element_type.default, x, (torch.bfloat16, torch.half)[i])
    ],
    "tied operand": lambda g, i, x, y: [g.call(aten.mul.Tensor, x, (y, x)[i])],
    "operands in another order": _order,
    "which result": _split,
    "value of a constant": _constants(torch.ones(4), torch.full((4,), 2.0)),
    "negative zero in a constant": _constants(torch.zeros(4), -torch.zeros(4)),
}


@pytest.mark.parametrize("name", DIFFERENT)
def test_one_difference_keeps_stretches_apart(name):
    first, second = pair(DIFFERENT[name])
    assert len(first.nodes) == len(second.nodes)
    assert first.form != second.form


def appended(graph: Graph, index: int, new: fx.Node, *past: fx.Node) -> list[fx.Node]:
    return [graph.call(aten.cat.default, [past[index], new])]


def caches(*lengths: int) -> tuple[Graph, Stretch, Stretch]:
    """Two layers that append to a cache of symbolic length each."""
    graph = Graph()
    past = [graph.input(length, 4, symbolic=True) for length in lengths]
    return graph, *stretches(graph, appended, graph.input(1, 4), *past)


def test_lengths_that_are_equal_now_agree_under_a_guard():
    graph, first, second = caches(5, 5)
    assert first.form == second.form
    assert first.symbols != second.symbols
    guards = len(graph.shapes.guards)
    assert agree(first, second, sizes_of(graph.graph))
    assert len(graph.shapes.guards) > guards
    a, b = (stretch.operands[0].meta["val"].shape[0] for stretch in (first, second))
    assert a.node.expr == b.node.expr


def test_lengths_that_differ_do_not_agree_and_leave_no_guard():
    graph, first, second = caches(5, 6)
    guards = len(graph.shapes.guards)
    assert not agree(first, second, sizes_of(graph.graph))
    assert len(graph.shapes.guards) == guards


def test_symbols_are_paired_one_to_one():
    """x of (n, 4) beside y of (n, 4), and x of (n, 4) beside y of (m, 4)."""
    graph = Graph()
    x, y = (graph.input(5, 4, symbolic=True) for _ in range(2))
    first, second = stretches(graph, appended, x, x, y)
    assert first.form != second.form
