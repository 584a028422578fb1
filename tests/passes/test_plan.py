"""plan on a graph built by hand: how each node is computed stands on the node, which stays."""

from __future__ import annotations

import pytest
import torch
from expecttest import assert_expected_inline
from graph_text import shown
from site_graphs import Finished, SiteGraph
from torch import nn

from lorafx.passes.fuse.fuse import Fuse
from lorafx.passes.match.match import Match
from lorafx.passes.plan import Plan

pytestmark = pytest.mark.quick

aten = torch.ops.aten
K, N, B = 4, 6, 3
ROWS = [0, -1, 2]


class One(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Linear(K, N)


def built(lowering: str) -> Finished:
    torch.manual_seed(0)
    g = SiteGraph(One(), ROWS, lowering=lowering)
    x = g.argument(torch.randn(B, K))
    g.declare("w")
    y = g.call(aten.linear.default, x, g.weight("w"), g.weight("w", "bias"))
    return g.output(g.mark("w", x, y, rows=1))


def test_the_graph_before_and_after() -> None:
    done = built("inductor")
    assert_expected_inline(
        shown(done, Plan(), first=(Match(), Fuse())),
        """\
fused_linear = lorafx.fused_linear(x, w_weight, w_bias, bank, slots, [0], [0], [6], 1,
    False)
return fused_linear

plan: 1 edit

fused_linear = lorafx.fused_linear(x, w_weight, w_bias, bank, slots, [0], [0], [6], 1,
    False)  # generated
return fused_linear
""",
    )


def test_the_reference_is_plain_aten() -> None:
    done = built("reference")
    assert done.run(Match(), Fuse(), Plan()) == 1
    ((state,),) = done.ctx.states.values()
    assert state.strategy.startswith("aten (")
