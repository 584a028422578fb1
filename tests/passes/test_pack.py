"""pack on graphs built by hand: siblings that share x become one node over the packed weight."""

from __future__ import annotations

import pytest
import torch
from dense_merge import error
from expecttest import assert_expected_inline
from graph_text import shown
from site_graphs import SiteGraph
from torch import nn

from lorafx.op_arguments import bound
from lorafx.passes.fuse import Fuse
from lorafx.passes.match import Match
from lorafx.passes.pack import Pack

pytestmark = pytest.mark.quick

aten = torch.ops.aten
K, B, T = 4, 3, 2
ROWS = [0, -1, 2]
SIZES = {"q": 6, "k": 2, "v": 3}
PLACE = ("siblings", "offsets", "sizes", "rows")


class Siblings(nn.Module):
    def __init__(self, biases: str = "qkv") -> None:
        super().__init__()
        for name, size in SIZES.items():
            setattr(self, name, nn.Linear(K, size, bias=name in biases))


def start(biases="qkv", *, inputs=1):
    torch.manual_seed(0)
    g = SiteGraph(Siblings(biases), ROWS)
    xs = [g.argument(torch.randn(B, T, K)) for _ in range(inputs)]
    for name in SIZES:
        g.declare(name, bias=name in biases)
    return g, xs


def site(g, name, x, rows=T):
    bias = [g.weight(name, "bias")] if g.site(name).module.bias is not None else []
    y = g.call(aten.linear.default, x, g.weight(name), *bias)
    return g.mark(name, x, y, rows=rows)


def check(g, done, inputs):
    for got, (name, x) in zip(done.result(), inputs, strict=True):
        assert error(got, g.merged(name, x)) <= 1e-5


def test_the_graph_before_and_after():
    g, (x,) = start()
    done = g.output(*(site(g, name, x) for name in SIZES))
    assert_expected_inline(
        shown(done, Pack(), first=(Match(), Fuse())),
        """\
fused_linear = lorafx.fused_linear(x, q_weight, q_bias, bank, slots, [0], [0], [6], 2,
    False)
fused_linear_1 = lorafx.fused_linear(x, k_weight, k_bias, bank, slots, [1], [6], [2], 2,
    False)
fused_linear_2 = lorafx.fused_linear(x, v_weight, v_bias, bank, slots, [2], [8], [3], 2,
    False)
return fused_linear, fused_linear_1, fused_linear_2

pack: 1 edit

fused_linear = lorafx.fused_linear(x, packed_weight, packed_bias, bank, slots, [0, 1, 2],
    [0, 6, 8], [6, 2, 3], 2, False)
split_with_sizes = aten.split_with_sizes(fused_linear, [6, 2, 3], -1)
getitem = getitem(split_with_sizes, 0)
getitem_1 = getitem(split_with_sizes, 1)
getitem_2 = getitem(split_with_sizes, 2)
return getitem, getitem_1, getitem_2
""",
    )


@pytest.mark.parametrize("biases", ["", "qv"])
def test_siblings_of_one_input_become_one_node(biases):
    g, (x,) = start(biases)
    done = g.output(*(site(g, name, x) for name in SIZES))
    assert done.run(Match(), Fuse(), Pack()) == 1
    assert done.targets() == ["fused_linear.default", "split_with_sizes.default", *["getitem"] * 3]
    ((node, states),) = done.ctx.states.items()
    call = bound(node)
    assert [state.site.path for state in states] == ["q", "k", "v"]
    assert {state.form for state in states} == {"packed"}
    assert [call[name] for name in PLACE] == [[0, 1, 2], [0, 6, 8], [6, 2, 3], T]
    (packed,) = g.program.packed
    assert done.values[done.ctx.frame.positions[call["weight"]]] is packed.weight
    assert (call["bias"] is not None) == bool(biases)
    check(g, done, [(name, done.values[0]) for name in SIZES])


def test_a_forward_that_does_not_add_its_bias_stays_by_itself():
    """One that leaves its bias to others, and one that scales it: the packed bias is neither."""
    g, (x,) = start()
    bare = g.call(aten.linear.default, x, g.weight("q"))
    scaled = g.call(aten.mul.Tensor, g.weight("k", "bias"), 3.0)
    thrice = g.call(aten.linear.default, x, g.weight("k"), scaled)
    marks = [g.mark("q", x, bare, rows=T), g.mark("k", x, thrice, rows=T), site(g, "v", x)]
    done = g.output(*marks)
    want = done.result()
    assert done.run(Match(), Fuse(), Pack()) == 0
    for got, expected in zip(done.result(), want, strict=True):
        assert error(got, expected) <= 1e-5


@pytest.mark.parametrize(("pair", "packs"), [(("q", "k"), 1), (("k", "v"), 1), (("q", "v"), 0)])
def test_only_neighbours_in_the_packed_weight(pair, packs):
    """Two of three share x: their rows must follow one another."""
    g, (x, other) = start(inputs=2)
    inputs = [(name, x if name in pair else other) for name in SIZES]
    done = g.output(*(site(g, *item) for item in inputs))
    assert done.run(Match(), Fuse(), Pack()) == packs
    assert done.targets().count("fused_linear.default") == 3 - packs
    values = {x: done.values[0], other: done.values[1]}
    check(g, done, [(name, values[item]) for name, item in inputs])


def test_other_row_maps_are_not_packed():
    g, (x,) = start()
    done = g.output(site(g, "q", x, rows=T), site(g, "k", x, rows=0))
    assert done.run(Match(), Fuse(), Pack()) == 0


def test_a_view_of_a_part_stands_its_strides():
    """Columns of the packed y are not contiguous, as tracing took them to be."""
    g, (x,) = start()
    q, k = site(g, "q", x), site(g, "k", x)
    merged = g.call(aten.view.default, q, [B * T, 6])
    strided = g.call(aten.as_strided.default, k, [B, T], [T * 2, 2])
    done = g.output(merged, strided)
    assert done.run(Match(), Fuse(), Pack()) == 1
    assert "reshape.default" in done.targets()
    got = done.result()
    assert error(got[0], g.merged("q", done.values[0]).view(B * T, 6)) <= 1e-5
    assert error(got[1], g.merged("k", done.values[0])[..., 0]) <= 1e-5
