"""Regions of a graph: runs of nodes that one module call made, and what is moved before them."""

from __future__ import annotations

import operator

import pytest
import torch
from site_graphs import FakeGraph
from torch import fx, nn
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv

from lorafx.passes.outline.isomorphism import stretch_of
from lorafx.passes.outline.regions import hoist_shared, regions_of

pytestmark = pytest.mark.quick

aten = torch.ops.aten


class Built(FakeGraph):
    """x (n, 4) and n as inputs; nodes know the calls that they were made in."""

    def __init__(self) -> None:
        self.graph = fx.Graph()
        shapes = ShapeEnv()
        self.mode = FakeTensorMode(shape_env=shapes)
        symbol = shapes.create_symbol(5, ConstantSource("n"), dynamic_dim=DimDynamic.DYNAMIC)
        self.n = self.graph.placeholder("n")
        self.n.meta["val"] = size = shapes.create_symintnode(symbol, hint=5)
        self.x = self.graph.placeholder("x")
        with self.mode:
            self.x.meta["val"] = torch.empty(size, 4)

    def made(self, calls: tuple[str, ...], target, *args) -> fx.Node:
        node = self.call(target, *args)
        if calls:
            node.meta["nn_module_stack"] = {name: (name, nn.Module) for name in calls}
        return node

    def done(self, *results: fx.Node) -> fx.GraphModule:
        self.graph.output(results)
        return fx.GraphModule(nn.Module(), self.graph)


def spans(graph: fx.Graph) -> list[list[str]]:
    return [[node.name for node in region.nodes] for region in regions_of(graph)]


def test_runs_of_nested_calls_with_nodes_that_no_call_made():
    b = Built()
    first = b.made((), aten.relu.default, b.x)
    sin = b.made(("a", "a.b"), aten.sin.default, first)
    added = b.made((), aten.tanh.default, sin)
    cos = b.made(("a", "a.b"), aten.cos.default, added)
    exp = b.made(("a",), aten.exp.default, cos)
    last = b.made((), aten.neg.default, exp)
    gm = b.done(last)
    assert spans(gm.graph) == [["sin_default", "tanh_default", "cos_default", "exp_default"],
                               ["sin_default", "tanh_default", "cos_default"]]  # fmt: skip


def test_random_numbers_end_a_run_and_attention_without_dropout_does_not():
    b = Built()
    sin = b.made(("a",), aten.sin.default, b.x)
    noise = b.made(("a",), aten.rand_like.default, sin)
    exp = b.made(("a",), aten.exp.default, noise)
    heads = b.made(("a",), aten.view.default, exp, [1, 1, b.n, 4])
    op = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
    attention = b.made(("a",), op, heads, heads, heads)
    gm = b.done(b.made(("a",), operator.getitem, attention, 0))
    assert [len(names) for names in spans(gm.graph)] == [4, 1]


def test_sizes_of_the_first_layer_are_computed_before_all():
    """The first layer reads n off an activation, and 2n off another: both layers use them."""
    b = Built()
    shared: list[fx.Node] = []
    h = b.x
    parts = []
    for name in ("a", "b"):
        h = b.made((name,), aten.sin.default, h)
        if not shared:
            shared.append(b.made((), aten.sym_size.int, h, 0))
            twice = b.made((), aten.cat.default, [h, h])
            shared.append(b.made((), aten.sym_size.int, twice, 0))
            shared.append(b.made((), operator.sub, shared[1], 1))
        ones = b.made((name,), aten.ones.default, [shared[2], 4])
        parts.append(b.made((name,), aten.sum.default, ones))
        h = b.made((name,), aten.view.default, h, [shared[0], 4])
    gm = b.done(h, *parts)
    hoist_shared(gm.graph)
    gm.graph.eliminate_dead_code()
    gm.recompile()
    first, second = (stretch_of(gm, region.nodes) for region in regions_of(gm.graph))
    assert first.form == second.form
    assert aten.sym_size.int not in {node.target for node in gm.graph.nodes}
    x = torch.randn(5, 4)
    out, *sums = gm(5, x)
    assert torch.equal(out, x.sin().sin())
    assert [float(value) for value in sums] == [36.0, 36.0]
