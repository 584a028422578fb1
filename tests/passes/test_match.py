"""match on graphs built by hand: marks kept, linears in disguise rewritten, the rest refused."""

from __future__ import annotations

import pytest
import torch
from dense_merge import error
from expecttest import assert_expected_inline
from graph_text import shown
from site_graphs import Holder, SiteGraph
from torch import nn

from lorafx.kernels.cpu.grouped_mm import GROUPED_MM
from lorafx.passes.match.match import Match

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


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up_proj = nn.Parameter(torch.randn(E, N, K))
        self.down_proj = nn.Parameter(torch.randn(E, K, N))


def routed(sorted_rows: bool):
    """x (M, K) and the experts: where their rows end, or one for each row."""
    torch.manual_seed(0)
    g = SiteGraph(Holder(experts=Experts()), ROWS, targets=["experts"])
    x = g.argument(torch.randn(E * T, K))
    choice = [1, E * T] if sorted_rows else [0, 1, 1, 0]
    choice = g.argument(torch.tensor(choice, dtype=torch.int32 if sorted_rows else torch.int64))
    weight = g.weight("experts.up_proj", "up_proj")
    g.input(g.program.runtime.slots)
    return g, x, choice, weight


def test_sorted_experts_before_and_after():
    g, x, ends, weight = routed(sorted_rows=True)
    right = g.call(aten.permute.default, weight, [0, 2, 1])
    done = g.output(g.call(GROUPED_MM, x, right, ends))
    assert_expected_inline(
        shown(done, Match()),
        """\
permute = aten.permute(experts_up_proj_up_proj, [0, 2, 1])
grouped_mm = lorafx.grouped_mm(x, permute, x_1)
return grouped_mm

match: 1 edit

permute = aten.permute(experts_up_proj_up_proj, [0, 2, 1])
grouped_mm = lorafx.grouped_mm(x, permute, x_1)
iota = prims.iota(4, start=0, step=1, dtype=torch.int32, device=cpu, requires_grad=False)
searchsorted = aten.searchsorted.Tensor(x_1, iota, out_int32=True, right=True)
expert_site = lorafx.expert_site(x, grouped_mm, bank, slots, searchsorted, [0], [0], [6], 0,
    2)
return expert_site
""",
    )


def test_chosen_experts_before_and_after():
    g, x, ids, weight = routed(sorted_rows=False)
    own = g.call(aten.permute.default, g.call(aten.index.Tensor, weight, [ids]), [0, 2, 1])
    y = g.call(aten.bmm.default, g.call(aten.unsqueeze.default, x, 1), own)
    done = g.output(g.call(aten.squeeze.dim, y, 1))
    assert_expected_inline(
        shown(done, Match()),
        """\
index = aten.index.Tensor(experts_up_proj_up_proj, [x_1])
permute = aten.permute(index, [0, 2, 1])
unsqueeze = aten.unsqueeze(x, 1)
bmm = aten.bmm(unsqueeze, permute)
squeeze = aten.squeeze.dim(bmm, 1)
return squeeze

match: 1 edit

index = aten.index.Tensor(experts_up_proj_up_proj, [x_1])
permute = aten.permute(index, [0, 2, 1])
unsqueeze = aten.unsqueeze(x, 1)
bmm = aten.bmm(unsqueeze, permute)
squeeze = aten.squeeze.dim(unsqueeze, 1)
squeeze_1 = aten.squeeze.dim(bmm, 1)
add = aten.add.Tensor(x_1, 2)
lt = aten.lt.Scalar(x_1, 0)
where = aten.where.self(lt, add, x_1)
expert_site = lorafx.expert_site(squeeze, squeeze_1, bank, slots, where, [0], [0], [6], 0,
    2)
reshape = aten.reshape(expert_site, [4, 1, 6])
squeeze_2 = aten.squeeze.dim(reshape, 1)
return squeeze_2
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


def doubled(g, x):
    twice = g.call(aten.mul.Tensor, g.weight("up"), 2.0)
    return g.call(aten.linear.default, x, twice)


def returned(g, x):
    return g.weight("up")


def scaled_product(g, x):
    flat = g.call(aten.view.default, x, [B * T, K])
    right = g.call(aten.permute.default, g.weight("up"), [1, 0])
    return g.call(aten.addmm.default, g.weight("up", "bias"), flat, right, alpha=2)


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (doubled, "no rule for aten.mul"),
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
