"""`lorafx::attention`: attention to keys and values that are tensors, not a paged cache.

    y[b, h, t] = Σ_j p[j] value[b, h // G, j]
    p = softmax(scale · query[b, h, t] · key[b, h // G, j] + mask[b, h, t, j])

    query (B, H, T, D), key and value (B, H / G, N, D); mask (B or 1, H or 1, T or 1, N) or none,
    one for each head only if G is 1. `causal`: query t sees keys up to t. Where it sees none,
    y is 0. `fixed`: the bits of a query depend on the keys that it sees alone.

On a CPU it is the kernel of paged attention (attention.cpp) over tensors, which reads each key once
for the G heads of queries that share it. Dtype, D, G and the distances between keys and between
values decide which kernel is generated (`AttentionForm`). Other tensors, and other devices, have
torch's operator. Sums are float32. No gradient is registered.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from typing import Any

import torch
from torch import Tensor

from lorafx.kernels.cpu.attention import ATTENTION_FILES, NO_FIXED, attention_sizes
from lorafx.kernels.cpu.compiler import Isa
from lorafx.kernels.cpu.cpu_source import (
    ELEMENTS,
    Key,
    add_kernel,
    address,
    dtype_code,
    dtype_of,
    kernel_source,
    loader,
    register,
)
from lorafx.kernels.cpu.kernels import WIDE, Kernels
from lorafx.kernels.ops.op_library import define, require
from lorafx.torch_internals.graph_parts import guard_or_false

ATTENTION_OPS = ("attention_args.h", "attention_op.cpp")


@dataclass(frozen=True)
class AttentionForm:
    """What a kernel is generated for: the dtype, numbers of a head, heads of queries that share one
    of keys, numbers from one key, and from one value, to the next, and whether bits are `fixed`."""

    dtype: torch.dtype
    size: int
    group: int
    key_row: int
    value_row: int
    fixed: bool = False

    @classmethod
    def of(
        cls, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *, fixed: bool = False
    ) -> AttentionForm | None:
        """None if no kernel is generated; the tensors may be fake."""
        tensors = (query, key, value, *([] if mask is None else [mask]))
        if any(t.dim() != 4 or t.dtype != query.dtype or t.device.type != "cpu" for t in tensors):
            return None
        (B, H, T, D), (_, heads, N, _) = query.shape, key.shape
        numbers = H, heads, D, key.stride(2), value.stride(2)
        if query.dtype not in ELEMENTS or not all(isinstance(n, int) and n for n in numbers):
            return None
        if H % heads or any(t.stride(3) != 1 for t in tensors):
            return None
        sizes: list[tuple[Tensor, tuple[int, ...]]] = [
            (key, (B, heads, N, D)),
            (value, (B, heads, N, D)),
        ]
        if mask is not None:
            fitting = zip(mask.shape, (B, H if heads == H else 1, T), strict=False)
            sizes.append((mask, (*(size if _is(given, size) else 1 for given, size in fitting), N)))
        if not all(_is(a, b) for t, shape in sizes for a, b in zip(t.shape, shape, strict=True)):
            return None
        return cls(query.dtype, D, H // heads, key.stride(2), value.stride(2), fixed)

    @property
    def key(self) -> Key:
        """The key by which attention_op.cpp finds the kernel."""
        dtype, *sizes = astuple(self)
        return dtype_code(dtype), *sizes

    @classmethod
    def of_key(cls, key: Key) -> AttentionForm | None:
        code, *sizes, fixed = key
        dtype = dtype_of(code)
        if dtype is None or dtype not in ELEMENTS:
            return None
        size, group, key_row, value_row = sizes
        return cls(dtype, size, group, key_row, value_row, bool(fixed))


def _is(size: Any, other: Any) -> bool:
    """Whether two sizes are equal; that of symbols becomes a guard of the graph."""
    return guard_or_false(size == other)


def source(form: AttentionForm, isa: Isa) -> str:
    sizes = {
        **attention_sizes(isa, form.size, form.group, fixed=form.fixed),
        **{"HEADS": 1, "ROW": form.size, "A_STRIDE": form.key_row, "B_STRIDE": form.value_row},
    }
    # Only -infinity hides a key from all queries: torch adds any other number.
    defines = {"CAPPED": 0, "HIDDEN": "(-__builtin_inff())"}
    elements = (form.dtype, form.dtype, torch.float32)
    return kernel_source(form, isa, elements, sizes, ATTENTION_FILES, defines)


@functools.cache
def op_library() -> ctypes.CDLL:
    return register("lorafx::attention", ATTENTION_OPS, load=_LOAD)


def _enter(form: AttentionForm, isa: Isa, library: ctypes.CDLL) -> bool:
    add_kernel(op_library(), form.key, address(library.lorafx_attention))
    return True


GENERATED = Kernels("attention stays with aten", source, _enter, lanes=WIDE)
_LOAD = loader(op_library, AttentionForm.of_key, GENERATED.ready)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Sequence[Tensor],
    causal: bool,
    scale: float,
    fixed: bool = False,
) -> Tensor:
    """The result (B, H, T, D), a transposed (B, T, H, D). Raises LoweringError if no generated
    kernel computes a `fixed` one."""
    attention_fake(query, key, value, mask, causal, scale)
    form = AttentionForm.of(query, key, value, mask[0] if mask else None, fixed=fixed)
    # A graph from a cache may be the first to need the kernel, which then replaces this function.
    if form is not None and GENERATED.ready(form):
        return ATTENTION(query, key, value, mask, causal, scale, fixed)
    require("attention", not fixed, NO_FIXED)
    added = mask[0] if mask else None
    out = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, added, is_causal=causal, scale=scale, enable_gqa=True
    )
    return out.transpose(1, 2).contiguous().transpose(1, 2)


def attention_fake(
    query: Tensor, key: Tensor, value: Tensor, mask: Sequence[Tensor], *others: Any
) -> Tensor:
    require("attention", query.dim() == key.dim() == 4, "query and key are (B, heads, tokens, D)")
    (B, H, T, D), (_, heads, *_) = query.shape, key.shape
    require("attention", key.shape == value.shape, "key and value have the same sizes")
    fits = key.shape[0] == B and key.shape[3] == D and H % heads == 0
    require("attention", fits, f"query is {tuple(query.shape)}, key {tuple(key.shape)}")
    require("attention", len(mask) < 2, "there is one mask or none")
    return query.new_empty(B, T, H, D).transpose(1, 2)


define(
    "attention(Tensor query, Tensor key, Tensor value, Tensor[] mask, bool causal, float scale, "
    "bool fixed=False) -> Tensor",
    attention,
    attention_fake,
    lowered=True,
)
ATTENTION = torch.ops.lorafx.attention.default
