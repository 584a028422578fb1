"""`lorafx::paged_cache` and `lorafx::paged_attention`: a step of continuous batching in a layer.

    key, value (1, H, T, D)   of the T new tokens of all sequences, one sequence after another
    cache (bytes,) uint8      all pages of all layers; rows of H · D numbers in it
    read (N,), write (T,)     rows of the layer's part of the cache, int64

`paged_cache` writes keys and values of new tokens into the cache and reads those that the queries
see, as transformers' `PagedAttentionCache.update` does (generation/continuous_batching). The
layer's keys begin at row `first_key`, its values at row `first_value`. A ring keeps a window: a new
token takes the row of the token that leaves the window, so old rows are read first, and each
`sentinel` in `read` stands for the next new token. Other caches are written before they are read.

`paged_attention` does the same, and returns the attention of the new tokens to these K and V:

    out[t, h] = Σ_j p[j] V[j],    p = softmax(cap(scale · q[t, h] · K[j]) + mask[t, j])
                                  for seen[t, 0] ≤ j < seen[t, 1]

Keys of other requests are not read, and sums are float32. Generated kernels (lorafx.kernels.cpu,
lorafx.kernels.triton) read keys and values from the cache directly. Without them the host waits for
`seen`, and each request is an attention of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from lorafx.kernels.ops.op_library import define, require


class Pages:
    """A paged cache; `pages`, (bytes,) uint8, holds all entries of all requests."""

    pages: Tensor


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
    """Keys and values that the queries see, (1, H, N, D), in the order of `read`. `seen` and `mask`
    are for the pass `attend`, which replaces the op by `paged_attention`."""
    new = (read == sentinel)[:, None, None] if ring else None
    keys = _write_and_read(cache, key, first_key, read, write, new)
    return keys, _write_and_read(cache, value, first_value, read, write, new)


def _write_and_read(
    cache: Tensor, states: Tensor, first: int, read: Tensor, write: Tensor, new: Tensor | None
) -> Tensor:
    states = states.squeeze(0).transpose(0, 1)
    rows = _rows_from(cache, states, first)
    if new is None:
        rows.index_copy_(0, write, states)
        seen = rows.index_select(0, read)
    else:
        seen = rows.index_select(0, read).masked_scatter_(new, states)
        rows.index_copy_(0, write, states)
    return seen.transpose(0, 1).unsqueeze(0)


def _rows_from(cache: Tensor, states: Tensor, first: int) -> Tensor:
    """The cache from its row `first` on, in rows like those of `states`, (T, H, D)."""
    width = states.shape[1] * states.shape[2]
    flat = cache.view(states.dtype)
    return flat[: flat.numel() // width * width].view(-1, *states.shape[1:])[first:]


def overwritten(
    key: Tensor,
    value: Tensor,
    cache: Tensor,
    write: Tensor,
    first_key: int,
    first_value: int,
    ring: bool,
    **_: Any,
) -> list[tuple[Tensor, Tensor]]:
    """(table, rows): rows in use that a step with these arguments writes. Those of a cache that is
    no ring are unused before, and the same step writes the same into them again."""
    if not ring:
        return []
    both = (key, first_key), (value, first_value)
    return [(_rows_from(cache, new[0].transpose(0, 1), first), write) for new, first in both]


def paged_cache_fake(key, value, cache, read, *_):
    tokens = read.shape[0]
    return tuple(
        states.new_empty((tokens, states.shape[1], states.shape[3])).transpose(0, 1).unsqueeze(0)
        for states in (key, value)
    )


class PagedStep(NamedTuple):
    """Arguments of `paged_attention`: the T new tokens of a step in one layer.

    Attributes:
        query: (1, H, T, D), of all requests' new tokens; keys have G heads, a divisor of H.
        seen: int64 (T, 2), where in `read` the keys of each token's request begin and end, 0 for
            none. Adjacent tokens with equal entries belong to the same request.
        mask: (1, 1, T, N), added to the scores; half of the dtype's lowest number hides a key.
        cap: c of c · tanh(score / c), before the mask is added; 0 for none.
        sinks: (H,), a further score for each head, with value 0.
        fixed: a query's bits depend on the keys that it sees alone, on a CPU.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    cache: Tensor
    read: Tensor
    write: Tensor
    seen: Tensor
    mask: Tensor
    first_key: int
    first_value: int
    sentinel: int
    ring: bool
    scale: float
    cap: float = 0.0
    sinks: Tensor | None = None
    fixed: bool = False

    def empty_result(self) -> Tensor:
        """A tensor (1, T, H, D) for the result, which is returned transposed."""
        _, heads, tokens, size = self.query.shape
        return self.query.new_empty((1, tokens, heads, size))


@dataclass(frozen=True)
class AttentionSpec:
    """Constants of generated kernels: `group` heads of queries share each head of keys."""

    dtype: torch.dtype
    heads: int
    group: int
    size: int
    capped: bool = False
    fixed: bool = False

    @classmethod
    def of_sizes(cls, step: PagedStep, **settings: Any) -> Self:
        heads, size = int(step.key.shape[1]), int(step.key.shape[3])
        group = int(step.query.shape[1]) // heads
        settings |= {"capped": step.cap != 0, "fixed": step.fixed}
        return cls(step.query.dtype, heads, group, size, **settings)


def paged_attention(step: PagedStep) -> Tensor:
    """The result (1, H, T, D), a transposed (1, T, H, D). Raises LoweringError for misfits; a
    generated kernel on a CPU also for a row outside of the cache."""
    check_step(step)
    return by_request(step)


def by_request(step: PagedStep) -> Tensor:
    """The reference: `paged_attention` without a generated kernel, on any device."""
    out = step.empty_result()
    settings = step.first_key, step.first_value, step.sentinel, step.ring
    keys, values = paged_cache(step.key, step.value, step.cache, step.read, step.write, *settings)
    group = step.query.shape[1] // keys.shape[1]
    ranges, counts = step.seen.unique_consecutive(dim=0, return_counts=True)
    token = 0
    for (begin, end), count in zip(ranges.tolist(), counts.tolist(), strict=True):
        tokens = slice(token, token + count)
        token += count
        k, v = (
            part[0, :, begin:end].repeat_interleave(group, 0).float() for part in (keys, values)
        )
        scores = step.query[0, :, tokens].float() @ k.mT * step.scale
        if step.cap:
            scores = torch.tanh(scores / step.cap) * step.cap
        scores = scores + step.mask[0, 0, tokens, begin:end].float()
        if step.sinks is not None:
            sink = step.sinks.float()[:, None, None].expand(-1, count, 1)
            scores = torch.cat([scores, sink], -1)
        weights = scores.softmax(-1)[..., : end - begin]
        out[0, tokens] = (weights @ v).transpose(0, 1).to(out.dtype)
    return out.transpose(1, 2)


def paged_attention_fake(step: PagedStep) -> Tensor:
    check_step(step)
    return step.empty_result().transpose(1, 2)


def check_step(step: PagedStep) -> None:
    op = "paged_attention"
    query, key, value, mask, sinks = step.query, step.key, step.value, step.mask, step.sinks
    read, write, seen = step.read, step.write, step.seen
    require(op, query.dim() == key.dim() == 4, "query and key are (1, heads, T, D)")
    require(op, key.shape == value.shape, f"key is {tuple(key.shape)}, value {tuple(value.shape)}")
    same = query.shape[0] == key.shape[0] == 1 and query.shape[2:] == key.shape[2:]
    require(op, same, f"query is {tuple(query.shape)}, key {tuple(key.shape)}")
    require(op, query.dtype == key.dtype == value.dtype, "query, key and value have one dtype")
    heads = query.shape[1], key.shape[1]
    require(op, heads[0] % heads[1] == 0, f"{heads[0]} heads of queries, {heads[1]} of keys")
    tokens = query.shape[2]
    require(op, seen.dim() == 2 and seen.shape[1] == 2, "seen is (T, 2)")
    require(op, write.shape[0] == tokens and seen.shape[0] == tokens, "write and seen are of T")
    ints = {part.dtype for part in (read, write, seen)}
    require(op, ints == {torch.int64}, "read, write and seen are int64")
    require(op, mask.dim() == 4 and mask.is_floating_point(), "mask is (1, 1, T, N), of floats")
    require(
        op,
        mask.shape[2] == tokens and mask.shape[3] == read.shape[0],
        f"mask is {tuple(mask.shape)} for {tokens} tokens and {read.shape[0]} rows",
    )
    require(op, sinks is None or sinks.shape == query.shape[1:2], "sinks is (H,)")


define(
    "paged_cache(Tensor key, Tensor value, Tensor(a!) cache, Tensor read, Tensor write, "
    "int first_key, int first_value, int sentinel, bool ring, "
    "Tensor? seen=None, Tensor? mask=None) -> (Tensor, Tensor)",
    paged_cache,
    paged_cache_fake,
)
define(
    "paged_attention(Tensor query, Tensor key, Tensor value, Tensor(a!) cache, Tensor read, "
    "Tensor write, Tensor seen, Tensor mask, int first_key, int first_value, int sentinel, "
    "bool ring, float scale, float cap=0., Tensor? sinks=None, bool fixed=False) -> Tensor",
    paged_attention,
    paged_attention_fake,
)
PAGED_CACHE = torch.ops.lorafx.paged_cache.default
PAGED_ATTENTION = torch.ops.lorafx.paged_attention.default
