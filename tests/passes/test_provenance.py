"""Proved row maps in the site op's arguments: a mixed batch equals its requests run one by one."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from graph_text import shown
from ownership_graphs import BANK, RANK, SLOTS, K, N, batch_of, inputs_of, lora, trace
from site_graphs import Holder, SiteGraph
from torch import nn

from lorafx.ownership.labels import Own
from lorafx.ownership.symbolic import BatchSymbols
from lorafx.passes.match import Match
from lorafx.passes.provenance import Provenance, apply
from lorafx.program.context import is_site
from lorafx.program.row_maps import RowMap, Unproved, prove_results

pytestmark = pytest.mark.quick

aten = torch.ops.aten
TABLE = torch.linspace(-1, 1, 9 * N, dtype=torch.float64).sin().view(9, N)
EMBEDDING = (BANK[0].repeat(1, 1, 5)[:, :, :9].transpose(1, 2).contiguous(), *BANK[1:])


def marked_embedding(ids, slots):
    y = F.embedding(ids, TABLE)
    return torch.ops.lorafx.embedding_site(ids, y, *EMBEDDING, slots, 0)


def batch_first(x, slots):
    return lora(x, slots)


def flattened(x, slots):
    return lora(x.flatten(0, 1), slots).view(x.shape[0], x.shape[1], N)


def sequence_first(x, slots):
    return lora(x.transpose(0, 1), slots).transpose(0, 1)


def repeated(x, slots):
    return lora(x.repeat_interleave(3, 0), slots).view(-1, 3, x.shape[1], N).sum(1)


def experts(x, slots):
    flat = x.flatten(0, 1)
    p = (flat[:, :2] * 10).long().flatten().argsort()
    y = lora(flat[p // 2], slots)
    return y[p.argsort()].view(x.shape[0], x.shape[1], 2, N).sum(2)


def two_in_a_row(x, slots):
    return lora(lora(x, slots)[..., :K].relu(), slots)


def learned_queries(x, slots):
    """Copies of something shared are given out, one a request."""
    queries = torch.ones(1, 2, K, dtype=x.dtype).expand(x.shape[0], -1, -1)
    return lora(queries, slots) + x.sum((1, 2))[:, None, None]


PROVED = (
    *(batch_first, flattened, sequence_first, repeated),
    *(experts, two_in_a_row, learned_queries),
)
BATCH_FIRST = (Own(0), None)


def traced(fn, batch: int, time: int, seeds=BATCH_FIRST):
    x = torch.randn(batch, time, K, dtype=torch.float64)
    slots = torch.zeros(batch, dtype=torch.int32)
    gm = trace(fn, [x, slots])
    return gm, dict(zip(inputs_of(gm), seeds, strict=True)), batch_of(inputs_of(gm))


def rewritten(fn, batch: int, time: int):
    gm, seeds, symbols = traced(fn, batch, time)
    proofs = apply(gm.graph, prove_results(gm.graph, seeds, symbols)[0], symbols)
    gm.graph.lint()
    gm.recompile()
    return gm, proofs


def test_the_graph_before_and_after():
    """The last argument of a site says how many rows each request has; 0 before it is proved."""
    batch, time = 3, 2
    g = SiteGraph(Holder(w=nn.Linear(K, N, bias=False)), rows=[0, -1, 2])
    x = g.argument(torch.randn(batch, time, K))
    g.declare("w", bias=False)
    flat = g.call(aten.view.default, x, [batch * time, K])
    y = g.call(aten.mm.default, flat, g.call(aten.permute.default, g.weight("w"), [1, 0]))
    y = g.mark("w", flat, y)
    done = g.output(g.call(aten.view.default, y, [batch, time, N]))
    assert_expected_inline(
        shown(done, Provenance(), first=(Match(),)),
        """\
view = aten.view(x, [6, 4])
permute = aten.permute(w_weight, [1, 0])
mm = aten.mm(view, permute)
site = lorafx.site(view, mm, bank, slots, [0], [0], [6], 0, None, None)
view_1 = aten.view(site, [3, 2, 6])
return view_1

provenance: 1 edit

view = aten.view(x, [6, 4])
permute = aten.permute(w_weight, [1, 0])
mm = aten.mm(view, permute)
site = lorafx.site(view, mm, bank, slots, [0], [0], [6], 2)
view_1 = aten.view(site, [3, 2, 6])
return view_1
""",
    )
    want = g.merged("w", done.values[0])
    torch.testing.assert_close(done.result()[0], want)


@pytest.mark.parametrize("fn", PROVED, ids=lambda fn: fn.__name__)
@pytest.mark.parametrize(("batch", "time"), [(2, 4), (3, 3)])
def test_mixed_batch_equals_requests_run_alone(fn, batch, time):
    gm, proofs = rewritten(fn, 3, 5)
    assert proofs
    assert all(isinstance(proof, RowMap) for proof in proofs.values())
    x = torch.randn(batch, time, K, dtype=torch.float64)
    slots = torch.tensor([1, -1, 2], dtype=torch.int32)[:batch]
    with torch.no_grad():
        together = gm(x, slots)
        alone = torch.cat([fn(x[b : b + 1], slots[b : b + 1]) for b in range(batch)])
    torch.testing.assert_close(together, alone, rtol=1e-9, atol=1e-9)
    assert (alone - fn(x, torch.full_like(slots, -1))).abs().max() > 1e-3


def test_embedding_rows():
    ids = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8], [0, 2, 4, 6]])
    slots = torch.tensor([2, 0, -1], dtype=torch.int32)
    gm = trace(lambda i, s: marked_embedding(i.t(), s).transpose(0, 1), [ids, slots])
    seeds, symbols = dict(zip(inputs_of(gm), BATCH_FIRST, strict=True)), batch_of(inputs_of(gm))
    apply(gm.graph, prove_results(gm.graph, seeds, symbols)[0], symbols)
    gm.recompile()
    alone = torch.cat([marked_embedding(ids[b : b + 1], slots[b : b + 1]) for b in range(3)])
    torch.testing.assert_close(gm(ids, slots), alone)


REFUSED = {
    "position table": (
        lambda x, slots: x[..., :1] + lora(torch.ones(x.shape[1], K).double(), slots),
        "shared by all requests",
    ),
    "requests mixed": (lambda x, slots: lora(x.cumsum(0), slots), "aten::cumsum"),
    "misleading view": (
        lambda x, slots: lora(x.reshape(x.shape[1], x.shape[0], K), slots),
        "aten::view",
    ),
    "copies that are mixed up afterwards": (
        lambda x, slots: x[..., :1] + lora(torch.ones(x.shape[0], K).double(), slots).flip(0)[0],
        "shared by all requests",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_the_reason(name):
    fn, reason = REFUSED[name]
    gm, seeds, symbols = traced(fn, 3, 5)
    (proof,) = prove_results(gm.graph, seeds, symbols)[0].values()
    assert isinstance(proof, Unproved)
    assert reason in proof.reason


def test_owner_dimension_that_is_the_features():
    x, slots = torch.randn(K, 5, 3, dtype=torch.float64), torch.zeros(3, dtype=torch.int32)

    def fn(x, slots):
        y = x @ torch.ones(x.shape[2], N, dtype=x.dtype)
        bank = (torch.ones(SLOTS, RANK, 3, dtype=x.dtype), *BANK[1:])
        return torch.ops.lorafx.site(x, y, *bank, slots, [0], [0], [N], 0)

    gm = trace(fn, [x, slots], static=(0,))
    seeds = dict(zip(inputs_of(gm), (Own(2), None), strict=True))
    (proof,) = prove_results(gm.graph, seeds, BatchSymbols.of([3]))[0].values()
    assert isinstance(proof, Unproved)
    assert "features" in proof.reason


def test_batch_of_one_owns_everything():
    """Rule of its own: sizes of one broadcast, but all rows are the one request's."""
    x, slots = torch.randn(1, 5, K, dtype=torch.float64), torch.tensor([2], dtype=torch.int32)
    gm = trace(REFUSED["position table"][0], [x, slots], static=(0, 1))
    symbols = BatchSymbols.of([1])
    proofs = prove_results(gm.graph, {}, symbols)[0]
    apply(gm.graph, proofs, symbols)
    gm.recompile()
    (site,) = filter(is_site, gm.graph.nodes)
    assert site.args[10] == 1
    torch.testing.assert_close(gm(x, slots), REFUSED["position table"][0](x, slots))
