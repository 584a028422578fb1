"""Whatever the sizes: what all ranks hold is what the checkpoint held."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lorafx.layers.base import ParallelLayer, ShardSizes, TensorParallel

pytestmark = pytest.mark.quick

SIZES = st.integers(1, 4)


def layer(rank, ranks, inputs, row, slices):
    """A layer as rank `rank` would build it; `slices` are (size of a piece, ranks that share it).

    Column layers cut outputs (a slice has ranks / copies pieces), row layers their inputs.
    """
    cut = ShardSizes(
        input_size=inputs * ranks if row else inputs,
        output_sizes=[part if row else part * ranks // copies for part, copies in slices],
        input_part=inputs,
        output_parts=[part for part, _ in slices],
    )
    tp = TensorParallel(ranks, rank, "none")
    return ParallelLayer(cut, True, tp, {"params_dtype": torch.float64})


@st.composite
def sharded(draw):
    """The layers of all ranks of a group."""
    ranks = draw(st.sampled_from([1, 2, 4, 6]))
    row = draw(st.booleans())
    divisors = [d for d in (1, 2, 3, 6) if ranks % d == 0]
    slices = draw(st.lists(st.tuples(SIZES, st.sampled_from(divisors)), min_size=1, max_size=4))
    inputs = draw(SIZES)
    return [layer(rank, ranks, inputs, row, slices) for rank in range(ranks)]


@st.composite
def partition(draw, count):
    """The slices 0 … count - 1 in any order, in groups, as shard ids."""
    order = draw(st.permutations(range(count)))
    ids = []
    while order:
        size = draw(st.integers(1, len(order)))
        ids.append(order[0] if size == 1 and draw(st.booleans()) else tuple(order[:size]))
        order = order[size:]
    return ids


def whole(first):
    generator = torch.Generator().manual_seed(0)
    shape = (first.output_size, first.input_size)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def joined(layers, pieces):
    """The ranks' (N_rank, K_rank) pieces put together, slice after slice, each piece once."""
    first = layers[0]
    if first.input_size != first.input_size_per_partition:
        return torch.cat(pieces, dim=1)
    columns = []
    for index, size in enumerate(first.output_sizes):
        start = sum(first.output_partition_sizes[:index])
        part = first.output_partition_sizes[index]
        copies = max(1, len(layers) * part // size)
        own = [piece[start : start + part] for piece in pieces]
        for group in range(0, len(own), copies):
            assert all(torch.equal(own[group], copy) for copy in own[group : group + copies])
        columns.extend(own[::copies])
    return torch.cat(columns)


@given(layers=sharded(), data=st.data())
def test_what_is_loaded_is_what_the_ranks_hold(layers, data):
    weight = whole(layers[0])
    rows = weight.split(list(layers[0].output_sizes))
    for shard_id in data.draw(partition(len(rows))):
        members = shard_id if isinstance(shard_id, tuple) else (shard_id,)
        loaded = torch.cat([rows[i] for i in members])
        for one in layers:
            one.load_weight("weight", loaded, shard_id)
            one.load_weight("bias", loaded[:, 0], shard_id)
    assert torch.equal(joined(layers, [one.weight for one in layers]), weight)
    if layers[0].input_size == layers[0].input_size_per_partition:
        assert all(torch.equal(one.bias, one.weight[:, 0]) for one in layers)
