"""rescale on a graph built by hand: DoRA's scale of each output behind the delta, in plain aten."""

from __future__ import annotations

import pytest
import torch
from dense_merge import error
from expecttest import assert_expected_inline
from graph_text import shown
from site_graphs import Finished, SiteGraph
from torch import Tensor, nn

from lorafx.passes.match.match import Match
from lorafx.passes.rescale import Rescale

pytestmark = pytest.mark.quick

aten = torch.ops.aten
K, N, B = 4, 6, 3
ROWS = [0, -1, 2]


class One(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Linear(K, N)


def built(*, dora: bool) -> tuple[SiteGraph, Finished]:
    torch.manual_seed(0)
    g = SiteGraph(One(), ROWS, dora=dora)
    x = g.argument(torch.randn(B, K))
    g.declare("w")
    y = g.call(aten.linear.default, x, g.weight("w"), g.weight("w", "bias"))
    return g, g.output(g.mark("w", x, y, rows=1))


def rescaled(g: SiteGraph, x: Tensor) -> Tensor:
    """y + G (y - c) of each request's slot, y that of W + ΔW."""
    y, (group,) = g.merged("w", x), g.program.groups
    gains, bias = group.bank.gains, g.site("w").module.bias
    rows = [y if s < 0 else y + gains[s] * (y - bias) for y, s in zip(y, ROWS, strict=True)]
    return torch.stack(rows)


def test_the_graph_before_and_after() -> None:
    g, done = built(dora=True)
    assert_expected_inline(
        shown(done, Rescale(), first=(Match(),)),
        """\
linear = aten.linear(x, w_weight, w_bias)
site = lorafx.site(x, linear, bank, slots, [0], [0], [6], 1, None, None, gains, w_bias)
return site

rescale: 1 edit

linear = aten.linear(x, w_weight, w_bias)
site = lorafx.site(x, linear, bank, slots, [0], [0], [6], 1)
iota = prims.iota(3, start=0, step=1, dtype=torch.int64, device=cpu, requires_grad=False)
div = aten.div.Scalar_mode(iota, 1, rounding_mode='floor')
remainder = aten.remainder.Scalar(div, 3)
index = aten.index.Tensor(slots, [remainder])
slice = aten.slice.Tensor(gains, 1, 0, 6)
index_1 = aten.index.Tensor(slice, [index])
ge = aten.ge.Scalar(index, 0)
unsqueeze = aten.unsqueeze(ge, -1)
ne = aten.ne.Scalar(index_1, 0)
logical_and = aten.logical_and(ne, unsqueeze)
sub = aten.sub.Tensor(site, w_bias)
mul = aten.mul.Tensor(index_1, sub)
add = aten.add.Tensor(site, mul)
where = aten.where.self(logical_and, add, site)
return where
""",
    )
    assert error(done.result()[0], rescaled(g, done.values[0])) <= 1e-5


def test_without_room_for_dora_nothing_is_done() -> None:
    g, done = built(dora=False)
    done.run(Match())
    before = done.targets()
    assert done.run(Rescale()) == 0
    assert done.targets() == before
    assert error(done.result()[0], g.merged("w", done.values[0])) <= 1e-5
