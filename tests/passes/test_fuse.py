"""fuse on graphs built by hand: a plain linear and its site become one node, others keep theirs."""

from __future__ import annotations

import pytest
import torch
from dense_merge import error
from expecttest import assert_expected_inline
from graph_text import shown
from site_graphs import Holder, SiteGraph
from torch import nn
from transformers.pytorch_utils import Conv1D

from lorafx.op_arguments import bound
from lorafx.passes.fuse import Fuse
from lorafx.passes.match import Match
from lorafx.program.context import FUSED_OP

pytestmark = pytest.mark.quick

aten = torch.ops.aten
K, N, B, T = 4, 6, 3, 2
ROWS = [0, -1, 2]
PLACE = ("siblings", "offsets", "sizes", "rows", "transposed")


def start(kind="biased"):
    torch.manual_seed(0)
    w = Conv1D(N, K) if kind == "transposed" else nn.Linear(K, N, bias=kind == "biased")
    g = SiteGraph(Holder(w=w), ROWS)
    x = g.argument(torch.randn(B, T, K))
    g.declare("w", bias=kind != "bare")
    return g, x


def product(g, x, *, transposed=False):
    """x (B, T, K) as PyTorch decomposes a linear: views around addmm."""
    flat = g.call(aten.view.default, x, [B * T, K])
    weight = g.weight("w")
    right = weight if transposed else g.call(aten.permute.default, weight, [1, 0])
    y = g.call(aten.addmm.default, g.weight("w", "bias"), flat, right)
    return g.call(aten.view.default, y, [B, T, N])


def test_the_graph_before_and_after():
    g, x = start()
    done = g.output(g.mark("w", x, product(g, x), rows=T))
    assert_expected_inline(
        shown(done, Fuse(), first=(Match(),)),
        """\
view = aten.view(x, [6, 4])
permute = aten.permute(w_weight, [1, 0])
addmm = aten.addmm(w_bias, view, permute)
view_1 = aten.view(addmm, [3, 2, 6])
site = lorafx.site(x, view_1, bank, slots, [0], [0], [6], 2, None, None)
return site

fuse: 1 edit

fused_linear = lorafx.fused_linear(x, w_weight, w_bias, bank, slots, [0], [0], [6], 2,
    False)
return fused_linear
""",
    )


@pytest.mark.parametrize("kind", ["biased", "transposed"])
def test_a_linear_and_its_site_become_one_node(kind):
    g, x = start(kind)
    done = g.output(g.mark("w", x, product(g, x, transposed=kind == "transposed"), rows=T))
    want = done.result()[0]
    assert done.run(Match(), Fuse()) == 1
    assert done.targets() == ["fused_linear.default"]
    (node,) = done.ctx.states
    call = bound(node)
    assert node.target is FUSED_OP
    assert call["x"] is x
    assert [call[name] for name in PLACE] == [[0], [0], [N], T, kind == "transposed"]
    assert done.ctx.states[node][0].form == "fused"
    assert error(done.result()[0], want) <= 1e-6
    assert error(want, g.merged("w", done.values[0])) <= 1e-5


def other_reader(g, x):
    y = product(g, x)
    return g.mark("w", x, y, rows=T), g.call(aten.relu.default, y)


def other_input(g, x):
    """The mark's x is not the product's: a forward that changes its input first."""
    y = g.call(aten.linear.default, g.call(aten.relu.default, x), g.weight("w"))
    return (g.mark("w", x, y, rows=T),)


def bias_of_another_shape(g, x):
    flat = g.call(aten.view.default, x, [B * T, K])
    right = g.call(aten.permute.default, g.weight("w"), [1, 0])
    wide = g.call(aten.expand.default, g.weight("w", "bias"), [B * T, N])
    y = g.call(aten.addmm.default, wide, flat, right)
    return (g.mark("w", x, g.call(aten.view.default, y, [B, T, N]), rows=T),)


@pytest.mark.parametrize("build", [other_reader, other_input, bias_of_another_shape])
def test_what_is_not_a_plain_linear_keeps_its_op(build):
    g, x = start()
    done = g.output(*build(g, x))
    want = done.result()
    before = done.targets()
    assert done.run(Match(), Fuse()) == 0
    assert done.targets() == before
    assert {state.form for (state,) in done.ctx.states.values()} == {"mark"}
    for got, expected in zip(done.result(), want, strict=True):
        assert torch.equal(got, expected)
