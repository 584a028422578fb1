"""rescale and replace_rows on graphs built by hand: what adapters change beside the delta."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from dense_merge import error
from expecttest import assert_expected_inline
from graph_text import shown
from site_graphs import Finished, Holder, SiteGraph
from torch import Tensor, nn

from lorafx.errors import ProvenanceError
from lorafx.passes.fuse import Fuse
from lorafx.passes.match import Match
from lorafx.passes.rescale import ReplaceRows, Rescale

pytestmark = pytest.mark.quick

aten = torch.ops.aten
K, N, B, T, V = 4, 6, 3, 2, 5
ROWS = [0, -1, 2]


def built(*, dora: bool) -> tuple[SiteGraph, Finished]:
    torch.manual_seed(0)
    g = SiteGraph(Holder(w=nn.Linear(K, N)), ROWS, dora=dora)
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
view = aten.view(index, [3])
alias = aten.alias(gains)
index_1 = aten.index.Tensor(alias, [view])
sub = aten.sub.Tensor(site, w_bias)
ge = aten.ge.Scalar(view, 0)
unsqueeze = aten.unsqueeze(ge, -1)
ne = aten.ne.Scalar(index_1, 0)
bitwise_and = aten.bitwise_and.Tensor(unsqueeze, ne)
mul = aten.mul.Tensor(index_1, sub)
add = aten.add.Tensor(site, mul)
where = aten.where.self(bitwise_and, add, site)
return where
""",
    )
    assert error(done.result()[0], rescaled(g, done.values[0])) <= 1e-5


def linear(rows: int = T, own: tuple[str, ...] = ("w",)) -> tuple[SiteGraph, Finished]:
    torch.manual_seed(0)
    g = SiteGraph(Holder(w=nn.Linear(K, N)), ROWS, own=own)
    x = g.argument(torch.randn(B, T, K))
    g.declare("w")
    y = g.call(aten.linear.default, x, g.weight("w"), g.weight("w", "bias"))
    return g, g.output(g.mark("w", x, y, rows=rows))


def embedding() -> tuple[SiteGraph, Finished]:
    torch.manual_seed(0)
    g = SiteGraph(Holder(w=nn.Embedding(V, N)), ROWS, targets=["w"], own=("w",))
    ids = g.argument(torch.tensor([[1, 3], [0, 1], [4, 3]]))
    g.declare("w", bias=False)
    y = g.call(aten.embedding.default, g.weight("w"), ids)
    return g, g.output(g.mark("w", ids, y, rows=T))


def taken(g: SiteGraph, at: tuple[int, ...]) -> Tensor:
    """The weight of slot 0, which has rows of its own: of a linear these outputs, of an embedding
    these ids."""
    bank = g.program.home(g.site("w"))[0].bank
    assert bank.own is not None
    assert bank.own_at is not None
    assert bank.own_table is not None
    bank.own.normal_()
    bank.own_table[0] = torch.tensor([1, 0, len(at), 0])
    weight = g.site("w").module.weight.clone()
    for row, place in enumerate(at):
        if bank.own_bias is None:
            bank.own_at[1, place] = row
        else:
            bank.own_at[1, row] = place
        weight[place] = bank.own[1, row]
    return weight


def test_own_rows_before_and_after() -> None:
    _, done = linear()
    assert_expected_inline(
        shown(done, ReplaceRows(), first=(Match(),)),
        """\
linear = aten.linear(x, w_weight, w_bias)
site = lorafx.site(x, linear, bank, slots, [0], [0], [6], 2, w_weight, None, None, None,
    own, own_at, own_table, own_bias)
return site

replace_rows: 1 edit

own_input = lorafx.own_input(x, own, own_table, slots, 2)
linear = aten.linear(own_input, w_weight, w_bias)
site = lorafx.site(own_input, linear, bank, slots, [0], [0], [6], 2)
own_linear = lorafx.own_linear(x, site, own, own_at, own_table, own_bias, None, None, slots,
    2, None, True)
return own_linear
""",
    )


@pytest.mark.parametrize("at", [(5, 3, 0), tuple(range(N))])
def test_a_linear_has_the_outputs_of_the_slots_rows(at: tuple[int, ...]) -> None:
    g, done = linear()
    weight, (x, *_) = taken(g, at), done.values
    bank, module = g.program.home(g.site("w"))[0].bank, g.site("w").module
    assert bank.own_bias is not None
    bank.own_bias.normal_()
    bias = module.bias.clone()
    bias[list(at)] = bank.own_bias[1, : len(at)]
    want = g.merged("w", x)
    want[0, :, list(at)] = F.linear(x[0], weight, bias)[:, list(at)]
    assert done.run(Match(), ReplaceRows(), Fuse()) == 1
    assert not done.gm.graph.find_nodes(op="call_function", target=aten.linear.default)
    assert error(done.result()[0], want) <= 1e-5


def test_an_embedding_has_the_slots_rows() -> None:
    g, done = embedding()
    weight, ids = taken(g, (3, 1)), done.values[0]
    bank, base = g.program.home(g.site("w"))[0].bank, g.site("w").module.weight
    want = []
    for slot, of in zip(ROWS, ids, strict=True):
        rank = 0 if slot < 0 else int(bank.ranks[slot, 0])
        delta = bank.scales[slot, 0] * bank.A[slot, of, :rank] @ bank.B[slot, :rank]
        want.append((weight if slot == 0 else base)[of] + delta)
    assert done.run(Match(), ReplaceRows()) == 1
    assert error(done.result()[0], torch.stack(want)) <= 1e-5


def test_unproved_rows_stay_refused() -> None:
    _, done = linear(rows=0)
    assert done.run(Match(), ReplaceRows()) == 1
    with pytest.raises(ProvenanceError, match="not proved"):
        done.result()
