"""Slots per token: which sites' rows are the (request, position) pairs in order, and which not."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from ownership_graphs import batch_of, by_keyword, inputs_of, labelled

from lorafx.ownership.labels import Own
from lorafx.ownership.tokens import LOST, Alignment

pytestmark = pytest.mark.quick

X = torch.randn(3, 5, 4, dtype=torch.float64)
WEIGHT = torch.randn(4, 8, dtype=torch.float64)
WIDE = torch.randn(4, 20, dtype=torch.float64)
SQUARE = torch.randn(5, 5, dtype=torch.float64)
IDS = torch.arange(15).view(3, 5)
TABLE = torch.randn(15, 4, dtype=torch.float64)


def block(x):
    """One layer of a causal decoder."""
    q = F.layer_norm(x, (4,)).unflatten(-1, (2, 2)).transpose(1, 2)
    mask = torch.ones(x.shape[1], x.shape[1]).bool().tril()
    mixed = F.scaled_dot_product_attention(q, q, q, attn_mask=mask).transpose(1, 2)
    x = x + mixed.reshape(x.shape[0], x.shape[1], 4)
    return x + F.gelu(x @ WEIGHT) @ WEIGHT.T


def scores(x):
    return (x @ x.transpose(1, 2)).softmax(-1) @ x


def summed(x):
    """As tensor parallelism sums what ranks have computed."""
    collectives = torch.ops._c10d_functional
    return collectives.wait_tensor(collectives.all_reduce(x, "sum", "ranks"))


TOKENS = {
    "itself": (lambda x: x, "1"),
    "block": (block, "1"),
    "flat": (lambda x: x.flatten(0, 1) @ WEIGHT, "1"),
    "heads": (lambda x: x.unflatten(-1, (2, 2)), "2"),
    "repeated": (lambda x: x.repeat_interleave(3, 1), "3"),
    "shared_table": (lambda x: x + torch.ones(x.shape[1], 4), "1"),
    "some_masked": (lambda x: x.index_put((x[:, :, 0] > 0,), torch.tensor(0.0).double()), "1"),
    "summed_over_ranks": (lambda x: x.clone().copy_(summed(x)), "1"),
    "pooled_and_joined": (lambda x: x + x.mean(1, keepdim=True), "1"),
    "shifted_and_added": (lambda x: x + x.roll(1, 1), None),
    "reversed": (lambda x: x.flip(1), None),
    "prefixed": (lambda x: torch.cat([torch.ones(x.shape[0], 1, 4), x], 1), None),
    "pooled": (lambda x: x.mean(1), None),
    "gathered": (lambda x: x.gather(1, x.argsort(1)), None),
    "sequence_first": (lambda x: x.transpose(0, 1), None),
    "requests_mixed": (lambda x: x.cumsum(0), None),
}


def aligned(fn, *examples):
    """(places, result, its label, graph, inputs) of a function whose first input has tokens."""
    label, flow, gm = labelled(fn, examples, [Own(0)] * len(examples))
    inputs = inputs_of(gm)
    places = Alignment(gm.graph, flow, batch_of(inputs[:1], 1), {inputs[0]: 1})
    return places, gm.graph.output_node().args[0], label, gm, inputs


def heads(x):
    """Four heads of as many features as there are tokens."""
    v = (x @ WIDE).unflatten(-1, (4, 5)).transpose(1, 2)
    mixed = F.scaled_dot_product_attention(v, v, v).transpose(1, 2).flatten(-2)
    return x + mixed @ WIDE.T


def turned(x):
    """A weight mixes the tokens."""
    return x + (x.transpose(1, 2) @ SQUARE).transpose(1, 2)


def turned_from_the_left(x):
    return x + SQUARE @ x


@pytest.mark.parametrize(
    ("fn", "expected"), [(heads, 1), (turned, None), (turned_from_the_left, None)]
)
def test_sizes_that_are_as_long_as_the_sequence(fn, expected):
    """In graphs for one size, and where a weight fixes the size."""
    label, flow, gm = labelled(fn, [X], [Own(0)], static=(0,))
    (x,) = inputs_of(gm)
    places = Alignment(gm.graph, flow, batch_of([x], 1), {x: 1})
    assert places.rows_in_order(gm.graph.output_node().args[0], label, 2) == expected


@pytest.mark.parametrize("name", TOKENS)
def test_rows_in_order(name):
    fn, expected = TOKENS[name]
    places, result, label, gm, inputs = aligned(fn, X)
    rows = places.rows_in_order(result, label, len(places.shape(result)) - 1)
    assert (None if rows is None else str(rows)) == expected
    by_keyword(gm.graph)
    again = Alignment(gm.graph, places.flow, batch_of(inputs, 1), {inputs[0]: 1})
    assert again.states == places.states


def test_what_is_not_a_token_input_is_lost():
    """Cross attention: queries are tokens of the decoder, keys are not."""

    def fn(x, memory):
        return scores(x + 0 * memory.mean(1, keepdim=True)), memory @ WEIGHT

    places, (first, second), label, _, (_, memory) = aligned(fn, X, X[:, :2].clone())
    assert places.rows_in_order(first, label, 2) == 1
    assert places.states[memory][1] is LOST
    assert places.rows_in_order(second, places.flow.labels[second], 2) is None


def test_embedded_ids_and_masks():
    def fn(ids, mask):
        return F.embedding(ids, TABLE) * mask[:, :, None]

    without, result, label, gm, inputs = aligned(fn, IDS, (IDS > 3).double())
    tokens = batch_of(inputs, 1)
    both = Alignment(gm.graph, without.flow, tokens, dict.fromkeys(inputs, 1))
    assert both.rows_in_order(result, label, 2) == 1
    without = Alignment(gm.graph, without.flow, tokens, {inputs[0]: 1})
    assert without.rows_in_order(result, label, 2) is None
