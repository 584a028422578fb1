"""`lorafx::paged_attention`: `lorafx::paged_cache`, and the attention of the new tokens to what it
holds, request by request.

    out[t, h] = Σ_j p[j] V[j],    p = softmax(cap(scale · q[t, h] · K[j]) + mask[t, j])
                                  for seen[t, 0] ≤ j < seen[t, 1]

K and V are what `lorafx::paged_cache` returns for the same arguments. The mask of a step hides the
keys of all other requests from a query; here they are not read. Sums are float32. On a CPU a
generated kernel reads keys and values where they lie in the cache (attention.cpp), and so do those
of a GPU (lorafx.kernels.triton.triton_attention). Elsewhere, and where none can be had, the host
waits for `seen`, and each request is an attention of its own.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable

import torch
from torch import Tensor

from lorafx.errors import LoweringError
from lorafx.kernels.cpu.attention_source import AttentionArgs, AttentionSpec, attention_source
from lorafx.kernels.cpu.compiler import (
    Isa,
    best_isa,
    compile_library,
    load_library,
    torch_function,
)
from lorafx.kernels.ops.op_checks import require
from lorafx.kernels.ops.op_library import define
from lorafx.kernels.ops.paged_cache import paged_cache

_SCHEMA = (
    "paged_attention(Tensor query, Tensor key, Tensor value, Tensor(a!) cache, Tensor read, "
    "Tensor write, Tensor seen, Tensor mask, int first_key, int first_value, int sentinel, "
    "bool ring, float scale, float cap=0., Tensor? sinks=None) -> Tensor"
)


def paged_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cache: Tensor,
    read: Tensor,
    write: Tensor,
    seen: Tensor,
    mask: Tensor,
    first_key: int,
    first_value: int,
    sentinel: int,
    ring: bool,
    scale: float,
    cap: float = 0.0,
    sinks: Tensor | None = None,
) -> Tensor:
    """The result of attention (1, H, T, D), a transposed (1, T, H, D).

    Args:
        query: (1, H, T, D), of all requests' new tokens.
        key, value, cache, read, write, first_key, first_value, sentinel, ring: as
            `lorafx::paged_cache` takes them, with G heads of keys, a divisor of H.
        seen: int64 (T, 2), where in `read` the keys of each token's request begin and end. Tokens
            that follow each other and have the same are of one request. One that sees none gets 0.
        mask: (1, 1, T, N), added to the scores; half of the dtype's lowest number hides a key.
        scale: of the scores.
        cap: c of c · tanh(score / c), before the mask is added; 0 for none.
        sinks: (H,), a further score of each head's, whose value is 0.

    Raises:
        LoweringError: sizes or dtypes that do not fit together, or a row outside of the cache.
    """
    check_arguments(query, key, value, read, write, seen, mask, sinks)
    kernel = kernel_of(query, key, mask, cap)
    if kernel is None:
        given = query, key, value, cache, read, write, seen, mask
        places = first_key, first_value, sentinel
        return by_request(*given, *places, ring, scale, cap, sinks)
    where = first_key, first_value, sentinel, ring
    out = query.new_empty((1, query.shape[2], query.shape[1], query.shape[3]))
    kernel(out, query, (key, value), cache, (read, write, seen), mask, where, scale, cap, sinks)
    return out.transpose(1, 2)


def by_request(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cache: Tensor,
    read: Tensor,
    write: Tensor,
    seen: Tensor,
    mask: Tensor,
    first_key: int,
    first_value: int,
    sentinel: int,
    ring: bool,
    scale: float,
    cap: float = 0.0,
    sinks: Tensor | None = None,
) -> Tensor:
    """`paged_attention` without a generated kernel, on any device."""
    out = query.new_empty((1, query.shape[2], query.shape[1], query.shape[3]))
    where = first_key, first_value, sentinel, ring
    keys, values = paged_cache(key, value, cache, read, write, *where)
    _each_request(out[0], query[0], keys[0], values[0], seen, mask[0, 0], scale, cap, sinks)
    return out.transpose(1, 2)


def _each_request(
    out: Tensor,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    seen: Tensor,
    mask: Tensor,
    scale: float,
    cap: float,
    sinks: Tensor | None,
) -> None:
    group = query.shape[0] // keys.shape[0]
    ranges, counts = seen.unique_consecutive(dim=0, return_counts=True)
    token = 0
    for (begin, end), count in zip(ranges.tolist(), counts.tolist(), strict=True):
        own = slice(token, token + count)
        token += count
        k, v = (part[:, begin:end].repeat_interleave(group, 0).float() for part in (keys, values))
        scores = query[:, own].float() @ k.mT * scale
        if cap:
            scores = torch.tanh(scores / cap) * cap
        scores = scores + mask[own, begin:end].float()
        if sinks is not None:
            sink = sinks.float()[:, None, None].expand(-1, count, 1)
            scores = torch.cat([scores, sink], -1)
        weights = scores.softmax(-1)[..., : end - begin]
        out[own] = (weights @ v).transpose(0, 1).to(out.dtype)


Kernel = Callable[..., None]


def kernel_of(query: Tensor, key: Tensor, mask: Tensor, cap: float = 0.0) -> Kernel | None:
    """The generated kernel for these arguments, if there is one; they may be fake."""
    spec = AttentionSpec.of(query, key, mask, cap != 0)
    return None if spec is None else _built(spec)


@functools.cache
def _built(spec: AttentionSpec) -> Kernel | None:
    try:
        return build(spec, best_isa())
    except LoweringError:
        return None  # where deltas are built it is told why


def build(spec: AttentionSpec, isa: Isa) -> Kernel:
    """The kernel of `spec`.

    Raises:
        LoweringError: no compiler works.
    """
    library = load_library(compile_library(attention_source(spec, isa), isa.flags))
    parallel = torch_function("torch_parallel_for")
    width = spec.heads * spec.size * spec.dtype.itemsize

    def run(
        out: Tensor,
        query: Tensor,
        states: tuple[Tensor, Tensor],
        cache: Tensor,
        index: tuple[Tensor, Tensor, Tensor],
        mask: Tensor,
        where: tuple[int, int, int, bool],
        scale: float,
        cap: float,
        sinks: Tensor | None,
    ) -> None:
        if query.stride(3) != 1:
            query = query.contiguous()
        if mask.stride(3) != 1:
            mask = mask.contiguous()
        new = [part.transpose(1, 2).contiguous() for part in states]
        read, write, seen = (part.contiguous() for part in index)
        sinks = None if sinks is None else sinks.float().contiguous()
        first_key, first_value, sentinel, ring = where
        pages, rows = cache.data_ptr(), cache.numel() // width
        status = library.lorafx_kernel(
            ctypes.byref(
                AttentionArgs(
                    *(out.data_ptr(), query.data_ptr(), mask.data_ptr()),
                    *(pages + first_key * width, pages + first_value * width),
                    *(part.data_ptr() for part in (*new, read, write, seen)),
                    None if sinks is None else sinks.data_ptr(),
                    *(query.shape[2], len(read), rows - first_key, rows - first_value),
                    *(query.stride(1), query.stride(2), mask.stride(2)),
                    *(sentinel, ring, torch.get_num_threads(), scale, cap, parallel),
                )
            )
        )
        if status == 1:
            raise LoweringError("lorafx::paged_attention: out of memory")
        if status:
            raise LoweringError(
                "lorafx::paged_attention: a row to read or write, or what a token sees, is outside "
                f"of a cache of {rows} rows or of the {len(read)} that are read"
            )

    return run


def paged_attention_fake(
    query,
    key,
    value,
    cache,
    read,
    write,
    seen,
    mask,
    first_key,
    first_value,
    sentinel,
    ring,
    scale,
    cap=0.0,
    sinks=None,
):
    check_arguments(query, key, value, read, write, seen, mask, sinks)
    _, heads, tokens, size = query.shape
    return query.new_empty((1, tokens, heads, size)).transpose(1, 2)


def check_arguments(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    read: Tensor,
    write: Tensor,
    seen: Tensor,
    mask: Tensor,
    sinks: Tensor | None,
) -> None:
    """Raise LoweringError where sizes or dtypes do not fit together; the tensors may be fake."""
    op = "paged_attention"
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


define(_SCHEMA, paged_attention, paged_attention_fake)
PAGED_ATTENTION = torch.ops.lorafx.paged_attention.default
