"""match on graphs built by hand: marks kept, linears in disguise rewritten, the rest refused."""

from __future__ import annotations

import pytest
import torch
from dense_merge import error
from expecttest import assert_expected_inline
from graph_text import shown
from site_graphs import Holder, SiteGraph
from torch import nn

from lorafx.passes.match import Match

pytestmark = pytest.mark.quick

aten = torch.ops.aten
K, N, B, T, E = 4, 6, 3, 2, 2
ROWS = [1, 1, 1]  # one adapter: rows are not proved yet when match runs


def start(*paths: str, **kwargs):
    torch.manual_seed(0)
    g = SiteGraph(Holder(up=nn.Linear(K, N), gate=nn.Linear(K, N)), ROWS)
    x = g.argument(torch.randn(B, T, K))
    g.declare(*paths, **kwargs)
    return g, x


def addmm(g, x, path="up"):
    flat = g.call(aten.view.default, x, [B * T, K])
    right = g.call(aten.permute.default, g.weight(path), [1, 0])
    y = g.call(aten.addmm.default, g.weight(path, "bias"), flat, right)
    return g.call(aten.view.default, y, [B, T, N])


def test_the_graph_before_and_after():
    """One use stands with its mark, which stays; the other has none, and gets the op."""
    g, x = start("up", "gate")
    done = g.output(g.mark("up", x, linear(g, x)), linear(g, x, "gate"))
    assert_expected_inline(
        shown(done, Match()),
        """\
linear = aten.linear(x, up_weight, up_bias)
site = lorafx.site(x, linear, bank, slots, [0], [0], [6], 0, packed_weight, packed_bias)
linear_1 = aten.linear(x, gate_weight, gate_bias)
return site, linear_1

match: 1 edit

linear = aten.linear(x, up_weight, up_bias)
site = lorafx.site(x, linear, bank, slots, [0], [0], [6], 0, packed_weight, packed_bias)
linear_1 = aten.linear(x, gate_weight, gate_bias)
site_1 = lorafx.site(x, linear_1, bank, slots, [0], [0], [6], 0)
return site, site_1
""",
    )


def linear(g, x, path="up"):
    return g.call(aten.linear.default, x, g.weight(path), g.weight(path, "bias"))


def from_the_left(g, x):
    """W xᵀ, as mamba's dt_proj does."""
    wide = g.call(aten.expand.default, g.call(aten.unsqueeze.default, g.weight("up"), 0), [B, N, K])
    y = g.call(aten.bmm.default, wide, g.call(aten.permute.default, x, [0, 2, 1]))
    y = g.call(aten.permute.default, y, [0, 2, 1])
    return g.call(aten.add.Tensor, y, g.weight("up", "bias"))


@pytest.mark.parametrize(
    ("build", "expected"),
    [
        (addmm, ["view", "permute", "addmm", "site", "view"]),
        (linear, ["linear", "site"]),
        (
            from_the_left,
            ["unsqueeze", "expand", "permute", "bmm", *["permute"] * 2, "site", *["permute"] * 2],
        ),
    ],
)
def test_an_unmarked_use_gets_its_delta(build, expected):
    g, x = start("up", marks=False)
    done = g.output(build(g, x))
    assert done.run(Match()) == 1
    names = [name.partition(".")[0] for name in done.targets() if not name.startswith("add.")]
    assert names == expected
    ((state,),) = done.ctx.states.values()
    assert (state.site.path, state.form) == ("up", "rewritten")
    assert error(done.result()[0], g.merged("up", done.values[0])) <= 1e-5


def test_each_use_gets_its_delta_once():
    g, x = start("up")
    marked = g.mark("up", x, addmm(g, x))
    done = g.output(g.call(aten.add.Tensor, marked, addmm(g, x)))
    assert done.run(Match()) == 1
    assert done.targets().count("site.default") == 2
    want = 2 * g.merged("up", done.values[0])
    assert error(done.result()[0], want) <= 1e-5


def test_a_mark_behind_other_arithmetic_moves_to_the_weights_use():
    g, x = start("up")
    y = g.call(aten.mul.Tensor, addmm(g, x), 3.0)
    done = g.output(g.mark("up", x, y))
    assert done.run(Match()) == 2
    assert done.targets().count("site.default") == 1
    assert error(done.result()[0], 3 * g.merged("up", done.values[0])) <= 1e-5


def scaled_by_rows(g, x):
    gains = g.call(aten.unsqueeze.default, g.weight("up", "bias"), 1)
    return g.call(aten.linear.default, x, g.call(aten.mul.Tensor, g.weight("up"), gains))


def returned(g, x):
    return g.weight("up")


def scaled_product(g, x):
    flat = g.call(aten.view.default, x, [B * T, K])
    right = g.call(aten.permute.default, g.weight("up"), [1, 0])
    return g.call(aten.addmm.default, g.weight("up", "bias"), flat, right, alpha=2)


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (scaled_by_rows, "no rule for aten.mul"),
        (returned, "the weight itself is returned"),
        (scaled_product, "alpha or beta"),
    ],
)
def test_an_unknown_use_is_refused_by_name(build, reason):
    g, x = start("up", "gate", marks=False)
    done = g.output(build(g, x), addmm(g, x, "gate"))
    assert done.run(Match()) == 1  # the other weight's use is rewritten
    ((when, paths, text),) = done.refusals()
    assert (when, paths) == ("always", ["up"])
    assert reason in text
    assert "its weight is used in a way that no rule covers" in text


def test_a_tied_weight_is_told_apart_by_its_use():
    torch.manual_seed(0)
    ends = Holder(embed=nn.Embedding(N, K), head=nn.Linear(K, N, bias=False))
    ends.head.weight = ends.embed.weight
    g = SiteGraph(ends, ROWS, targets=["embed", "head"])
    ids = g.argument(torch.randint(0, N, (B, T)))
    g.weight("embed")
    h = g.call(aten.embedding.default, g.weight("embed"), ids)
    y = g.call(aten.linear.default, h, g.weight("head"))
    done = g.output(y)
    assert done.run(Match()) == 2
    assert [state.site.path for (state,) in done.ctx.states.values()] == ["embed", "head"]
    assert [name for name in done.targets() if "site" in name] == [
        "embedding_site.default",
        "site.default",
    ]
