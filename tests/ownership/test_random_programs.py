"""No label is ever wrong: random index programs and expert dispatch against brute-force taint.

Each is traced once with symbolic sizes and judged by taint on other sizes, T a multiple of B and T
equal to B among them. Expert dispatch, of which what the usual roads give back is proved:

    route       keys of each (token, choice), by top-k of the token's own scores
    order       a permutation p of them by expert: sort or argsort, stable or not, either way
    gather      rows p // k of x, or rows p of repeated x
    work        a function of a row and of its expert, and weights gathered at p
    back        p undone by argsort, by an index or scatter of an iota, or added where it
                came from

or no permutation at all: a mask an expert.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from ownership_graphs import batch_of, inputs_of, taint, trace
from random_programs import STEPS, K, exchange_sizes
from random_programs import program as random_program
from slowly import each, few
from torch import Tensor, fx

from lorafx.ownership.flow import Flow
from lorafx.ownership.labels import Mixed, One, Own
from lorafx.ownership.propagate import flow_through

H, E = K, 5
GATE = torch.linspace(-3, 3, H * E, dtype=torch.float64).sin().view(H, E)
#: A factor of each expert: what stands for its weights.
FACTORS = torch.linspace(0.5, 2.0, E, dtype=torch.float64)

Inverse = Callable[[Tensor], Tensor]


def by_index(p: Tensor) -> Tensor:
    inverse = torch.empty_like(p)
    inverse[p] = torch.arange(p.shape[0])
    return inverse


def by_scatter(p: Tensor) -> Tensor:
    return torch.empty_like(p).scatter(0, p, torch.arange(p.shape[0]))


def by_argsort(p: Tensor) -> Tensor:
    return p.argsort()


INVERSES: tuple[Inverse, ...] = (by_index, by_scatter, by_argsort)


def routed(flat: Tensor, k: int, r: random.Random) -> tuple[Tensor, Tensor]:
    """The k experts (T, k) that each token chooses and their weights."""
    scores = flat @ GATE
    if r.random() < 0.5:
        weights, chosen = scores.softmax(-1).topk(k, -1)
    else:  # chosen by other scores than those that weigh
        chosen = (scores.sigmoid() + FACTORS).topk(k, -1, sorted=False).indices
        weights = scores.sigmoid().gather(1, chosen)
    if r.random() < 0.5:
        weights = weights / weights.sum(-1, keepdim=True)
    return chosen, weights


def ordered(keys: Tensor, r: random.Random) -> Tensor:
    descending = r.random() < 0.3
    road = r.randrange(4)
    if road == 0:
        return keys.argsort(descending=descending)
    if road == 1:
        return keys.sort(descending=descending).indices
    if road == 2:
        return keys.argsort(stable=True, descending=descending)
    return torch.sort(keys, stable=True, descending=descending)[1]


def worked(rows: Tensor, experts: Tensor) -> Tensor:
    """A function of each row and its expert alone; `experts` (rows,)."""
    return (rows * FACTORS[experts].unsqueeze(-1)).tanh()


def permuted(flat: Tensor, k: int, r: random.Random) -> Tensor:
    """By a permutation and its inverse: (T, H) → (T, H)."""
    chosen, weights = routed(flat, k, r)
    keys = chosen.flatten()
    p = ordered(keys, r)
    if r.random() < 0.5:
        rows = flat[p // k]
    elif r.random() < 0.5:
        rows = flat.repeat_interleave(k, 0)[p]
    else:
        rows = flat.unsqueeze(1).expand(-1, k, -1).reshape(-1, H).index_select(0, p)
    y = worked(rows, keys[p])
    late = r.random() < 0.5
    if not late:
        y = y * weights.flatten()[p].unsqueeze(-1)
    inverse = r.choice(INVERSES)(p)
    y = y[inverse] if r.random() < 0.5 else y.index_select(0, inverse)
    if late:
        y = y * weights.reshape(-1, 1)
    return y.view(-1, k, H).sum(1)


def added_back(flat: Tensor, k: int, r: random.Random) -> Tensor:
    """Results added to the token that they came from."""
    chosen, weights = routed(flat, k, r)
    p = ordered(chosen.flatten(), r)
    tokens = p // k
    y = worked(flat[tokens], chosen.flatten()[p]) * weights.flatten()[p, None]
    if r.random() < 0.5:
        return torch.zeros_like(flat).index_add(0, tokens, y)
    return torch.zeros_like(flat).index_put((tokens,), y, accumulate=True)


def masked(flat: Tensor, k: int, r: random.Random) -> Tensor:
    """Every expert sees every token; what was not chosen counts nothing."""
    chosen, weights = routed(flat, k, r)
    y = torch.zeros_like(flat)
    for e in range(E):
        hit = chosen == e
        if r.random() < 0.5:
            y = y + (flat * FACTORS[e]).tanh() * (weights * hit).sum(1, keepdim=True)
        else:
            one = (flat * FACTORS[e]).tanh() * weights.masked_fill(~hit, 0).sum(1, keepdim=True)
            y = torch.where(hit.any(1, keepdim=True), y + one, y)
    return y


def not_undone(flat: Tensor, k: int, r: random.Random) -> Tensor:
    """A wrong inverse: the permutation once more."""
    chosen, weights = routed(flat, k, r)
    p = ordered(chosen.flatten(), r)
    y = worked(flat[p // k], chosen.flatten()[p]) * weights.flatten()[p, None]
    return y[p].view(-1, k, H).sum(1)


#: Each road, and whether its result is owned as its input is; False where nothing can be known.
ROADS: dict[Callable[[Tensor, int, random.Random], Tensor], bool] = {
    permuted: True,
    added_back: True,
    masked: True,
    not_undone: False,
}


def program(road: Callable, seed: int, k: int, layers: int) -> Callable[[Tensor], Tensor]:
    def run(x: Tensor) -> Tensor:
        r = random.Random(seed)
        for _ in range(layers):
            x = x + road(x.flatten(0, 1), k, r).view(x.shape)
        return x

    return run


def judge(run: Callable[[Tensor], Tensor], dim: int, seed: int) -> Flow:
    """The labels of a program, none of which is contradicted by any of several calls."""
    shape = [3, 3, K]
    shape[1 - dim] = 5
    gm = trace(run, [torch.randn(shape, dtype=torch.float64)])
    (x,) = inputs_of(gm)
    flow = flow_through(gm.graph, {x: Own(dim)}, batch_of([x], dim))
    for batch, time in ((3, 5), (2, 1), (3, 3), (2, 6)):
        shape[dim], shape[1 - dim] = batch, time
        generator = torch.Generator().manual_seed(seed + batch)
        before = torch.randn(shape, dtype=torch.float64, generator=generator)
        after, request = before.clone(), seed % batch
        part = after.select(dim, request)
        part.copy_(torch.randn(part.shape, dtype=torch.float64, generator=generator))
        try:
            found = taint(gm, flow, [before], [after], request, batch)
        except (RuntimeError, IndexError):
            continue  # these sizes fail a check that tracing took for granted (a guard)
        assert found == [], (seed, shape)
    return flow


def result_of(flow: Flow) -> fx.Node:
    graph = next(iter(flow.labels)).graph
    return graph.output_node().args[0]


@pytest.mark.parametrize("road", few(ROADS, permuted, not_undone), ids=lambda road: road.__name__)
@settings(
    max_examples=4,
    derandomize=True,
    phases=[Phase.generate],  # programs are small already; shrinking one takes minutes
)
@given(
    seed=st.integers(0, 10**9), k=st.integers(1, 3), layers=st.integers(1, 2), dim=st.integers(0, 1)
)
def test_dispatch(road, seed, k, layers, dim):
    flow = judge(program(road, seed, k, layers), dim, seed)
    label = flow.labels[result_of(flow)]
    if ROADS[road]:
        assert label == Own(dim), label
    else:
        assert isinstance(label, Mixed), label


def test_a_loop_over_the_experts_that_were_chosen():
    """Rows found by a mask: as many as there are, and nobody knows whose."""

    def run(x: Tensor) -> Tensor:
        flat = x.flatten(0, 1)
        chosen, weights = routed(flat, 2, random.Random(0))
        y = torch.zeros_like(flat)
        for e in range(E):
            tokens, at = (chosen == e).nonzero().unbind(1)
            rows = (flat[tokens] * FACTORS[e]).tanh() * weights[tokens, at, None]
            y = y.index_add(0, tokens, rows)
        return y

    flow = judge(run, 0, 7)
    assert isinstance(flow.labels[result_of(flow)], Mixed)


@pytest.mark.parametrize("count", few([5, 15], 5))
def test_no_label_is_contradicted(count):
    @settings(max_examples=count, derandomize=True)
    @given(seed=st.integers(0, 10**9), length=st.integers(2, 8), dim=st.integers(0, 1))
    def run(seed, length, dim):
        judge(random_program(seed, length), dim, seed)

    run()


@pytest.mark.parametrize("step", each(3, dict.fromkeys(STEPS)), ids=lambda step: step.__name__)
def test_every_step_keeps_some_owner(step):
    """The judge is not vacuous: for some draw each step leaves an owned result or refuses one."""
    kinds = set()
    for seed in range(6):
        x = torch.randn(3, 5, K, dtype=torch.float64)
        gm = trace(lambda x, s=seed: step(x, random.Random(s)), [x])
        flow = flow_through(gm.graph, {inputs_of(gm)[0]: Own(0)}, batch_of(inputs_of(gm)))
        kinds.add(type(flow.labels[result_of(flow)]))
    assert kinds <= {Own, One, Mixed}
    assert Own in kinds or step is exchange_sizes
