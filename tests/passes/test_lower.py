"""lower on graphs built by hand: LoRA nodes become base products and deltas added in place."""

from __future__ import annotations

import pytest
import torch
from dense_merge import error
from expecttest import assert_expected_inline
from graph_text import shown
from site_graphs import Holder, SiteGraph
from torch import nn
from transformers.pytorch_utils import Conv1D

from lorafx.passes.fuse import Fuse
from lorafx.passes.lower import Lower
from lorafx.passes.match import Match

pytestmark = pytest.mark.quick

aten = torch.ops.aten
K, N, B, T, VOCAB = 4, 6, 3, 2, 7
ROWS = [0, -1, 2]


def start(path, x, lowering="inductor"):
    torch.manual_seed(0)
    modules = {"with_bias": nn.Linear(K, N), "without": nn.Linear(K, N, bias=False)}
    modules |= {"transposed": Conv1D(N, K), "embed": nn.Embedding(VOCAB, N)}
    g = SiteGraph(Holder(**modules), ROWS, lowering=lowering, targets=list(modules))
    node = g.argument(x)
    g.declare(path, bias=path in ("with_bias", "transposed"))
    return g, node


def product(g, path, x):
    if path == "transposed":
        flat = g.call(aten.view.default, x, [B * T, K])
        y = g.call(aten.addmm.default, g.weight(path, "bias"), flat, g.weight(path))
        return g.call(aten.view.default, y, [B, T, N])
    bias = [g.weight(path, "bias")] if path == "with_bias" else []
    return g.call(aten.linear.default, x, g.weight(path), *bias)


def wrapped(done):
    """The in-place ops inside auto_functionalized."""
    return [
        node.args[0]._schema.name.partition("::")[2]
        for node in done.gm.graph.nodes
        if node.op == "call_function" and node.target is torch.ops.higher_order.auto_functionalized
    ]


def test_the_graph_before_and_after():
    """Without a plan, so in plain ops: the base's product, and the delta added to it in place."""
    g, x = start("with_bias", torch.randn(B, T, K))
    done = g.output(g.mark("with_bias", x, product(g, "with_bias", x), rows=T))
    assert_expected_inline(
        shown(done, Lower(), first=(Match(), Fuse())),
        """\
fused_linear = lorafx.fused_linear(x, with_bias_weight, with_bias_bias, bank, slots, [0],
    [0], [6], 2, False)
return fused_linear

lower: 1 edit

reshape = aten.reshape(x, [-1, 4])
permute = aten.permute(with_bias_weight, [1, 0])
addmm = aten.addmm(with_bias_bias, reshape, permute)
auto_functionalized = auto_functionalized(lorafx.add_delta_, addmm, reshape, bank, slots,
    [0], [0], [6], 2)
getitem = getitem(auto_functionalized, 1)
reshape_1 = aten.reshape(getitem, [3, 2, 6])
return reshape_1
""",
    )


@pytest.mark.parametrize(
    ("path", "base"), [("with_bias", "addmm"), ("without", "mm"), ("transposed", "addmm")]
)
def test_a_fused_linear(path, base):
    torch.manual_seed(2)
    x = torch.randn(B, T, K)
    g, node = start(path, x)
    done = g.output(g.mark(path, node, product(g, path, node), rows=T))
    want = g.merged(path, x)
    assert done.run(Match(), Fuse(), Lower()) == 1
    names = [name.partition(".")[0] for name in done.targets()]
    assert names.count(base) == 1
    assert "fused_linear" not in names
    assert wrapped(done) == ["add_delta_"]
    assert error(done.result()[0], want) <= 1e-5
    (states,) = done.ctx.states.values()
    assert [state.site.path for state in states] == [path]


def test_a_site_that_was_not_fused():
    """y has another reader, which must see the base's y: the delta may not be written over it."""
    torch.manual_seed(2)
    x = torch.randn(B, T, K)
    g, node = start("with_bias", x)
    y = product(g, "with_bias", node)
    done = g.output(g.mark("with_bias", node, y, rows=T), g.call(aten.relu.default, y))
    want = done.result()
    assert done.run(Match(), Fuse(), Lower()) == 1
    assert wrapped(done) == ["add_delta_"]
    for got, expected in zip(done.result(), want, strict=True):
        assert error(got, expected) <= 1e-6


def test_an_embedding():
    torch.manual_seed(2)
    ids = torch.randint(0, VOCAB, (B, T))
    g, node = start("embed", ids)
    y = g.call(aten.embedding.default, g.weight("embed"), node)
    done = g.output(g.mark("embed", node, y, rows=T))
    want = done.result()[0]
    base = torch.nn.functional.embedding(ids, g.site("embed").module.weight)
    assert error(want, base) > 1e-2
    assert done.run(Match(), Fuse(), Lower()) == 1
    assert wrapped(done) == ["add_embedding_delta_"]
    assert error(done.result()[0], want) <= 1e-6
