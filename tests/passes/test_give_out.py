"""Copies, one a request, of what all requests share: a mixed batch equals its requests run alone.

Small programs are traced, rewritten, proved and run; random ones (`random_programs`) come between
the shared site and the place where its result joins what requests own.
"""

from __future__ import annotations

import random

import pytest
import torch
from expecttest import assert_expected_inline
from graph_text import shown
from ownership_graphs import BANK, WEIGHT, K, N, batch_of, inputs_of, lora, trace
from random_programs import STEPS
from site_graphs import Holder, SiteGraph
from slowly import each, few
from torch import nn

from lorafx.ownership.labels import Own
from lorafx.passes.give_out import GiveOut, give_out
from lorafx.passes.match import Match
from lorafx.passes.provenance import Provenance, apply
from lorafx.program.row_maps import RowMap, Unproved, prove_results

aten = torch.ops.aten

SHARED = torch.linspace(-1, 1, 12 * K, dtype=torch.float64).sin().view(12, K)
SECOND = torch.linspace(-1, 1, N * N, dtype=torch.float64).cos().view(N, N)
BACK = (BANK[0].repeat(1, 1, 2)[..., :N].contiguous(), *BANK[1:])


def second(x, slots):
    return torch.ops.lorafx.site(x, x @ SECOND, *BACK, slots, [0], [0], [N], 0)


@pytest.mark.quick
def test_the_graph_before_and_after():
    batch, time = 3, 2
    torch.manual_seed(0)
    g = SiteGraph(Holder(w=nn.Linear(K, N, bias=False)), rows=[0, -1, 2])
    x = g.argument(torch.randn(batch, time, N))
    g.declare("w", bias=False)
    table = torch.randn(time, K)
    shared = g.constant("positions", table)
    y = g.call(aten.mm.default, shared, g.call(aten.permute.default, g.weight("w"), [1, 0]))
    y = g.call(aten.relu.default, g.mark("w", shared, y))
    done = g.output(g.call(aten.add.Tensor, x, y))
    assert_expected_inline(
        shown(done, GiveOut(), first=(Match(),)),
        """\
permute = aten.permute(w_weight, [1, 0])
mm = aten.mm(positions, permute)
site = lorafx.site(positions, mm, bank, slots, [0], [0], [6], 0, None, None)
relu = aten.relu(site)
add = aten.add.Tensor(x, relu)
return add

give_out: 1 edit

permute = aten.permute(w_weight, [1, 0])
mm = aten.mm(positions, permute)
unsqueeze = aten.unsqueeze(positions, 0)
expand = aten.expand(unsqueeze, [3, -1, -1])
unsqueeze_1 = aten.unsqueeze(mm, 0)
expand_1 = aten.expand(unsqueeze_1, [3, -1, -1])
site = lorafx.site(expand, expand_1, bank, slots, [0], [0], [6], 0)
relu = aten.relu(site)
unsqueeze_2 = aten.unsqueeze(relu, 1)
squeeze = aten.squeeze.dim(unsqueeze_2, 1)
add = aten.add.Tensor(x, squeeze)
return add
""",
    )
    done.run(Provenance())
    each = g.merged("w", table.expand(batch, time, K))
    torch.testing.assert_close(done.result()[0], done.values[0] + each.relu())


def positions(time):
    return torch.arange(time)[:, None] * torch.linspace(0.1, 1, K, dtype=torch.float64)


def added(x, slots):
    """(T, N) to (B, T, N)."""
    return x @ WEIGHT + lora(positions(x.shape[1]), slots)


def multiplied(x, slots):
    """Queries by keys of positions, as relative attention has them: expanded, then one product."""
    q = (x @ WEIGHT).unflatten(-1, (2, 3)).transpose(1, 2)
    p = lora(positions(2 * x.shape[1] - 1)[None], slots).view(1, -1, 2, 3).permute(0, 2, 3, 1)
    return torch.matmul(q, p)


def repeated(x, slots):
    """DeBERTa's keys: heads folded into the requests, the shared side tiled."""
    q = (x @ WEIGHT).unflatten(-1, (2, 3)).transpose(1, 2).flatten(0, 1)
    p = lora(SHARED, slots).view(-1, 2, 3).transpose(0, 1).repeat(x.shape[0], 1, 1)
    return torch.bmm(q, p.transpose(1, 2)).view(x.shape[0], 2, x.shape[1], -1)


def two_layers(x, slots):
    hidden = lora(SHARED, slots).relu()
    table = second(hidden, slots).view(-1, N)
    index = torch.arange(x.shape[1])[:, None] % 5
    return x @ WEIGHT + torch.nn.functional.layer_norm(table[index].squeeze(1), (N,)).tanh()


def windows(x, slots):
    """Windows folded into the requests, which a shared bias meets."""
    y = (x @ WEIGHT).repeat_interleave(3, 0)
    return (y + lora(SHARED[:1], slots)[None]).view(x.shape[0], 3, x.shape[1], N)


def several_meet(x, slots):
    one, other = lora(SHARED, slots), second(lora(2 * SHARED, slots), slots)
    both = torch.cat([one, other, SHARED @ WEIGHT]).softmax(0)
    return x @ WEIGHT * both.amax(0, keepdim=True)


def in_a_mask(x, slots):
    q = (x @ WEIGHT).unflatten(-1, (2, 3)).transpose(1, 2)
    bias = (lora(positions(x.shape[1]), slots) @ torch.ones(N, 2, dtype=x.dtype)).t()[None, :, None]
    mask = torch.zeros_like(q[..., :1]) + bias
    return torch.nn.functional.scaled_dot_product_attention(q, q, q, mask)


def queries(x, slots):
    """Learned queries that meet each request's keys and values, without an expansion."""
    q, k = lora(SHARED, slots), x @ WEIGHT
    weights = torch.einsum("qd,bkd->bqk", q, k).softmax(-1)
    return weights @ k


def queries_attend(x, slots):
    k = (x @ WEIGHT).unflatten(-1, (2, 3)).transpose(1, 2)
    q = lora(SHARED, slots).view(1, -1, 2, 3).transpose(1, 2)
    return torch.nn.functional.scaled_dot_product_attention(q.expand(x.shape[0], -1, -1, -1), k, k)


def repeated_queries(x, slots):
    """Queries of a model that repeats them for each request first."""
    k = (x @ WEIGHT).unflatten(-1, (2, 3)).transpose(1, 2)
    q = lora(SHARED[:4].repeat(x.shape[0], 1), slots).view(x.shape[0], -1, 2, 3).transpose(1, 2)
    return torch.einsum("bhid,bhjd->bhij", q, k)


def queries_of_one_head(x, slots):
    k = x @ WEIGHT
    return torch.matmul(k.flatten(0, 1), lora(SHARED, slots).mT).view(x.shape[0], x.shape[1], -1)


def weights(x, slots):
    """A weight that a delta makes each request's own."""
    return x @ lora(SHARED[:K], slots)


def image_positions(x, slots):
    """A convolution over positions, one image for all requests, repeated for each."""
    grid = SHARED.view(1, K, 3, 4)
    kernel = WEIGHT.t().reshape(N, K, 1, 1)
    y = torch.nn.functional.conv2d(grid, kernel)
    y = torch.ops.lorafx.conv_site(
        grid, y, *BANK, slots, 0, [1, 1], [1, 1], [0, 0, 0, 0], None, None, None
    )
    y = torch.nn.functional.conv2d(y * 0.01, torch.ones(N, N, 2, 2, dtype=x.dtype)).tanh()
    return (x @ WEIGHT).mean(1) + y.repeat(x.shape[0], 1, 1, 1).sum((2, 3))


def first_states(x, slots):
    """A cell's states, which begin alike in all rows; the batch holds each request both ways."""
    both = torch.cat([x, x.flip(1)]) @ WEIGHT
    state = lora(SHARED[:1].repeat(both.shape[0], 1), slots).tanh()
    state = second((both[:, 0] + state).tanh(), slots) + both[:, -1]
    return state.view(2, x.shape[0], N).sum(0)


def coordinates(x, slots):
    """RAFT's first flow: an image for each row of the batch, alike in all, joined with theirs."""
    images = (x @ WEIGHT).mean(1)[:, :, None, None].expand(-1, -1, 3, 4)
    grid = SHARED.view(1, K, 3, 4).repeat(2 * x.shape[0], 1, 1, 1)
    y = torch.nn.functional.conv2d(grid, WEIGHT.t().reshape(N, K, 1, 1))
    y = torch.ops.lorafx.conv_site(
        grid, y, *BANK, slots, 0, [1, 1], [1, 1], [0, 0, 0, 0], None, None, None
    )
    y = torch.nn.functional.conv2d(y * 0.01, torch.ones(N, N, 2, 2, dtype=x.dtype)).tanh()
    return (
        torch.cat([torch.cat([images, -images])[..., 1:, 1:], y], 1).view(2, x.shape[0], -1).sum(0)
    )


GIVEN = (
    added, multiplied, repeated, two_layers, windows, several_meet, in_a_mask, queries,
    queries_attend, queries_of_one_head, weights, image_positions, first_states,
    repeated_queries, coordinates,
)  # fmt: skip


def rewritten(fn, batch=3, time=5):
    """The graph of fn with copies given out and rows proved, and the proofs."""
    x = torch.randn(batch, time, K, dtype=torch.float64)
    gm = trace(fn, [x, torch.zeros(batch, dtype=torch.int32)])
    inputs, batch = inputs_of(gm), batch_of(inputs_of(gm))
    seeds = {inputs[0]: Own(0), inputs[1]: None}
    env = inputs[0].meta["val"].fake_mode.shape_env
    guards = len(env.guards), dict(env.replacements)
    _, kept = give_out(gm.graph, seeds, batch)
    assert (len(env.guards), env.replacements) == guards, "a size was taken for a number"
    gm.graph.eliminate_dead_code()
    proofs = apply(gm.graph, prove_results(gm.graph, seeds, batch)[0], batch)
    gm.graph.lint()
    gm.recompile()
    return gm, proofs, kept


def equals_requests_alone(gm, fn, batch, time) -> None:
    x = torch.randn(batch, time, K, dtype=torch.float64)
    slots = torch.tensor([1, -1, 2, 0], dtype=torch.int32)[:batch]
    with torch.no_grad():
        together = gm(x, slots)
        alone = torch.cat([fn(x[b : b + 1], slots[b : b + 1]) for b in range(batch)])
        base = fn(x, torch.full_like(slots, -1))
    torch.testing.assert_close(together, alone, rtol=1e-9, atol=1e-9)
    assert (alone - base)[0].abs().max() > 1e-6


@pytest.mark.quick
@pytest.mark.parametrize("fn", each(2, GIVEN), ids=lambda fn: fn.__name__)
def test_mixed_batch_equals_requests_run_alone(fn):
    gm, proofs, _ = rewritten(fn)
    assert proofs
    assert all(isinstance(proof, RowMap) for proof in proofs.values()), proofs
    for batch, time in ((3, 5), (2, 4), (4, 4)):
        equals_requests_alone(gm, fn, batch, time)


KEPT = {
    "result of the graph": (
        lambda x, slots: (x.sum(2), lora(positions(x.shape[1]), slots)),
        "the graph's result",
    ),
    "order that depends on values": (
        lambda x, slots: x @ WEIGHT + lora(SHARED, slots).sort(0).values[:1],
        "aten::sort",
    ),
    "operator without a product": (
        lambda x, slots: torch.cdist(x @ WEIGHT, lora(SHARED[:K], slots)[None]),
        "aten::",
    ),
    "copies that are mixed up afterwards": (
        lambda x, slots: (
            x @ WEIGHT + lora(SHARED[:1], slots)[None].expand(x.shape[0], -1, -1).flip(0)
        ),
        "its row ownership is still not proved",
    ),
    "meets what mixes requests": (
        lambda x, slots: (x @ WEIGHT).cumsum(0) + lora(SHARED[:1], slots),
        "aten::cumsum",
    ),
}


@pytest.mark.quick
@pytest.mark.parametrize("name", KEPT)
def test_what_cannot_be_given_out_is_left_as_it_was(name):
    fn, reason = KEPT[name]
    x, slots = torch.randn(3, 5, K, dtype=torch.float64), torch.zeros(3, dtype=torch.int32)
    gm = trace(fn, [x, slots])
    inputs, batch = inputs_of(gm), batch_of(inputs_of(gm))
    seeds = {inputs[0]: Own(0), inputs[1]: None}
    before, values = str(gm.graph), {node: node.meta.get("val") for node in gm.graph.nodes}
    sites, kept = give_out(gm.graph, seeds, batch)
    assert not sites
    (why,) = kept.values()
    assert reason in why
    assert str(gm.graph) == before
    assert all(node.meta.get("val") is values[node] for node in gm.graph.nodes)
    (proof,) = prove_results(gm.graph, seeds, batch)[0].values()
    assert isinstance(proof, Unproved)
    assert "shared by all requests" in proof.reason


def between(seed: int, length: int):
    """A program whose shared site reaches the requests through random operators."""

    def fn(x, slots):
        r, y = random.Random(seed), lora(SHARED[:6], slots)
        for _ in range(length):
            y = r.choice(STEPS)(y, r)
            if y.dim() > 4:
                y = y.sum(r.randrange(5))
        flat = y.flatten()
        ramp = torch.linspace(0.5, 1, flat.shape[0], dtype=x.dtype)
        return (x @ WEIGHT) * (1 + (flat * ramp).sum(0, keepdim=True))

    return fn


@pytest.mark.parametrize("count", few([6, 8], 6))
def test_random_programs_between_site_and_requests(count):
    given = 0
    for seed in range(count):
        fn = between(seed, 1 + seed % 5)
        gm, proofs, kept = rewritten(fn)
        proved = all(isinstance(proof, RowMap) for proof in proofs.values())
        assert proved == (not kept)
        if proved:
            given += 1
            x = torch.randn(4, 3, K, dtype=torch.float64)
            slots = torch.tensor([1, -1, 2, 0], dtype=torch.int32)
            with torch.no_grad():
                alone = torch.cat([fn(x[b : b + 1], slots[b : b + 1]) for b in range(4)])
                torch.testing.assert_close(gm(x, slots), alone, msg=f"seed {seed}")
    assert given > count // 4
