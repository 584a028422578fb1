"""`lorafx::paged_cache`: writes the keys and values of new tokens into a paged cache, and reads
those that the queries see.

    key, value (1, H, T, D)   of the T new tokens of all sequences, one sequence after another
    cache (bytes,) uint8      all pages of all layers; rows of H · D numbers in it
    read (N,), write (T,)     rows of the layer's part of the cache, int64
    seen (T, 2), mask         which of the N are of each token's request, and what its attention
                              adds; read by lorafx::paged_attention alone

The layer's keys begin at row `first_key`, its values at row `first_value`. A ring keeps a window: a
new token takes the row of the one that leaves it, so the old rows are read first, and an entry of
`read` that is `sentinel` stands for the next new token. Other caches are written first.

That is what transformers' `PagedAttentionCache.update` does (generation/continuous_batching). There
it writes into views of one tensor, of which a functional graph would need copies; here the graph
has one operator, which says what it writes into.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lorafx.kernels.ops.op_library import define

SCHEMA = (
    "paged_cache(Tensor key, Tensor value, Tensor(a!) cache, Tensor read, Tensor write, "
    "int first_key, int first_value, int sentinel, bool ring, "
    "Tensor? seen=None, Tensor? mask=None) -> (Tensor, Tensor)"
)


def paged_cache(
    key: Tensor,
    value: Tensor,
    cache: Tensor,
    read: Tensor,
    write: Tensor,
    first_key: int,
    first_value: int,
    sentinel: int,
    ring: bool,
    seen: Tensor | None = None,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The keys and values that the queries see, (1, H, N, D), in the order of `read`."""
    new = (read == sentinel)[:, None, None] if ring else None
    found = [
        _updated(cache, states, first, read, write, new)
        for states, first in ((key, first_key), (value, first_value))
    ]
    return found[0], found[1]


def _updated(
    cache: Tensor, states: Tensor, first: int, read: Tensor, write: Tensor, new: Tensor | None
) -> Tensor:
    states = states.squeeze(0).transpose(0, 1)
    width = states.shape[1] * states.shape[2]
    flat = cache.view(states.dtype)
    rows = flat[: flat.numel() // width * width].view(-1, *states.shape[1:])[first:]
    if new is None:
        rows.index_copy_(0, write, states)
        seen = rows.index_select(0, read)
    else:
        seen = rows.index_select(0, read).masked_scatter_(new, states)
        rows.index_copy_(0, write, states)
    return seen.transpose(0, 1).unsqueeze(0)


def paged_cache_fake(key, value, cache, read, *_):
    tokens = read.shape[0]
    return tuple(
        states.new_empty((tokens, states.shape[1], states.shape[3])).transpose(0, 1).unsqueeze(0)
        for states in (key, value)
    )


define(SCHEMA, paged_cache, paged_cache_fake)

PAGED_CACHE = torch.ops.lorafx.paged_cache.default
