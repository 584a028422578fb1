"""`lorafx::attention` against float64: keys and values in tensors, of fewer heads than queries."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from dense_merge import error
from paged_steps import TOLERANCE
from toolchain import needs_compiler
from torch import Tensor
from torch.library import opcheck

from lorafx.errors import LorafxWarning, LoweringError
from lorafx.kernels.cpu import dense_attention
from lorafx.kernels.cpu.compiler import Isa, runnable_isas
from lorafx.kernels.cpu.dense_attention import ATTENTION, AttentionForm

ISAS = [isa for isa in runnable_isas() if dense_attention.GENERATED.generates(isa)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
#: B, T, N, heads of keys, queries' heads of each, D: one token and many, whole units of work and
#: parts, a last vector that is not full.
SIZES = [
    (2, 1, 37, 2, 3, 16),
    (1, 70, 70, 2, 1, 40),
    (3, 5, 33, 1, 4, 10),
    (2, 9, 9, 3, 1, 64),
    (1, 2, 130, 1, 71, 8),
]


def tensors(B: int, T: int, N: int, heads: int, group: int, D: int, dtype: torch.dtype) -> Any:
    """(query, key, value), queries and values as a projection leaves them, keys in a cache that has
    room for more."""
    torch.manual_seed(T)
    query = torch.randn(B, T, heads * group, D).to(dtype).transpose(1, 2)
    key = torch.randn(B, heads, N + 3, D).to(dtype)[:, :, :N]
    return query, key, torch.randn(B, N, heads, D).to(dtype).transpose(1, 2)


def masks(B: int, T: int, N: int, heads: int, dtype: torch.dtype) -> Iterator[Tensor]:
    """For all, for each request and query with some that see no key, and for each head."""
    visible = torch.rand(B, 1, T, N) < 0.6
    visible[0, 0, 0] = False
    yield torch.randn(1, 1, 1, N).to(dtype)
    yield torch.zeros(B, 1, T, N, dtype=dtype).masked_fill(~visible, -torch.inf)
    yield torch.full((B, 1, T, N), torch.finfo(dtype).min, dtype=dtype)
    yield torch.randn(1, heads, T, N).to(dtype)


def wanted(query: Tensor, key: Tensor, value: Tensor, mask: list[Tensor], causal: bool) -> Tensor:
    group = query.shape[1] // key.shape[1]
    k, v = (part.double().repeat_interleave(group, 1) for part in (key, value))
    scores = query.double() @ k.mT * 0.3
    for part in mask:
        scores = scores + part.double()
    if causal:
        hidden = torch.ones(scores.shape[2:], dtype=torch.bool).triu(1)
        scores = scores.masked_fill(hidden, -torch.inf)
    return scores.softmax(-1).nan_to_num(0) @ v


def check(operands: Any, mask: list[Tensor], causal: bool = False, fixed: bool = False) -> None:
    query = operands[0]
    got = ATTENTION(*operands, mask, causal, 0.3, fixed)
    assert got.dtype == query.dtype
    assert got.transpose(1, 2).is_contiguous()
    assert error(got.double(), wanted(*operands, mask, causal)) <= TOLERANCE[query.dtype]


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("isa", ISAS, ids=lambda isa: isa.name)
@pytest.mark.usefixtures("tried_anew")
def test_generated_kernels(isa: Isa, dtype: torch.dtype) -> None:
    for sizes, fixed in [*itertools.product(SIZES[:-1], (False, True)), (SIZES[-1], False)]:
        B, T, N, heads, group, _ = sizes
        operands = tensors(*sizes, dtype)
        form = AttentionForm.of(*operands, None, fixed=fixed)
        assert form is not None
        dense_attention.GENERATED.load(form, isa)
        check(operands, [], fixed=fixed)
        check(operands, [], causal=True, fixed=fixed)
        *for_all, per_head = masks(B, T, N, heads * group, dtype)
        for mask in (*for_all, *([per_head] if group == 1 else [])):
            check(operands, [mask], fixed=fixed)


@needs_compiler
def test_neighbours_change_nothing() -> None:
    """A request's result has the same bits alone and in a batch, and so has a query's."""
    query, key, value = tensors(3, 70, 70, 2, 2, 16, torch.bfloat16)
    whole = ATTENTION(query, key, value, [], True, 0.3)
    for b in range(3):
        own = (part[b : b + 1] for part in (query, key, value))
        assert torch.equal(ATTENTION(*own, [], True, 0.3)[0], whole[b])
    first = ATTENTION(query[:, :, :1], key, value, [], True, 0.3)
    assert torch.equal(first, whole[:, :, :1])


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fixed_bits_depend_on_the_keys_that_a_query_sees(dtype: torch.dtype) -> None:
    """Not on hidden keys on either side, nor on how many queries there are."""
    query, key, value = tensors(1, 70, 70, 2, 2, 16, dtype)
    value = value.transpose(1, 2).contiguous().transpose(1, 2)
    whole = ATTENTION(query, key, value, [], True, 0.3, True)
    for left, right in ((0, 1), (1, 0), (37, 0), (5, 40)):
        beside = [torch.randn(1, 2, n, 16).to(dtype) for n in (left, right)]
        keys, values = (torch.cat([beside[0], part, beside[1]], 2) for part in (key, value))
        seen = torch.ones(70, 70, dtype=torch.bool).tril()
        hidden = ~torch.nn.functional.pad(seen, (left, right))
        mask = torch.zeros(hidden.shape, dtype=dtype).masked_fill(hidden, -torch.inf)
        for first, last in ((0, 70), (69, 70), (3, 36)):
            part = ATTENTION(
                query[:, :, first:last],
                keys,
                values,
                [mask[None, None, first:last]],
                False,
                0.3,
                True,
            )
            assert torch.equal(part, whole[:, :, first:last])


@needs_compiler
@pytest.mark.parametrize("sizes", [(0, 3, 4, 2, 2, 8), (2, 0, 4, 2, 1, 8), (2, 3, 0, 2, 1, 8)])
def test_nothing_to_attend(sizes: Any) -> None:
    operands = tensors(*sizes, torch.float32)
    got = ATTENTION(*operands, [], False, 0.3)
    assert got.shape == operands[0].shape
    assert not got.any()


def test_numbers_that_are_not_finite() -> None:
    """A NaN stays in the rows that read it."""
    query, key, value = tensors(2, 4, 6, 2, 1, 8, torch.float32)
    key[1, 0, 2, 3] = torch.nan
    got = ATTENTION(query, key, value, [], False, 0.3)
    assert got[1, 0].isnan().all()
    assert not got[0].isnan().any()
    assert not got[1, 1].isnan().any()


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.usefixtures("refused_sources")
def test_without_a_kernel(dtype: torch.dtype) -> None:
    """The operator by torch's own."""
    operands = tensors(*SIZES[0], dtype)
    with (
        pytest.warns(LorafxWarning, match="attention stays with aten: refused")
        if (dtype in DTYPES)
        else nullcontext()
    ):
        got = dense_attention.attention(*operands, [], False, 0.3)
    assert error(got.double(), wanted(*operands, [], False)) <= TOLERANCE.get(dtype, 1e-12)


@needs_compiler
def test_what_no_kernel_is_generated_for() -> None:
    query, key, value = tensors(*SIZES[1], torch.float32)
    assert AttentionForm.of(query, key, value, None) is not None
    mask = torch.zeros(1, 1, 70, 70)
    assert AttentionForm.of(query, key, value, mask) is not None
    for changed in (
        (query.double(), key.double(), value.double(), None),
        (query.half(), key, value, None),
        (query[..., ::2], key[..., ::2], value[..., ::2], None),
        (query, key, value[:, :, :9], None),
        (query, key, value, mask.half()),
        (query, key, value, mask[..., :1]),
        (query[0], key[0], value[0], None),
    ):
        assert AttentionForm.of(*changed) is None


@needs_compiler
@pytest.mark.parametrize(
    ("changed", "text"),
    [
        (lambda q, k, v: (q, k, v[:, :, :1], []), "key and value differ in size"),
        (lambda q, k, v: (q[:, :1], k, v, []), "query and key do not fit together"),
        (lambda q, k, v: (q, k, v, [torch.zeros(1, 1, 2, 37)]), "the mask is not"),
        (lambda q, k, v: (q, k, v, [torch.zeros(1, 1, 1, 37)] * 2), "one mask or none"),
        (lambda q, k, v: (q[..., ::2], k[..., :8], v[..., :8], []), "are not adjacent"),
    ],
)
def test_misfits(changed: Any, text: str) -> None:
    operands = tensors(*SIZES[0], torch.float32)
    check(operands, [])  # the kernel in C++ has replaced the function in Python
    with pytest.raises(RuntimeError, match=text):
        ATTENTION(*changed(*operands), False, 0.3)


def test_misfits_without_memory() -> None:
    query, key, value = (part.to("meta") for part in tensors(*SIZES[0], torch.float32))
    with pytest.raises(LoweringError, match="key and value have the same sizes"):
        ATTENTION(query, key, value[:, :, :1], [], False, 0.3)
    with pytest.raises(LoweringError, match=r"query is .*, key"):
        ATTENTION(query[:, :1], key, value, [], False, 0.3)


@pytest.mark.parametrize("mask", [False, True])
def test_opcheck(mask: bool) -> None:
    operands = tensors(*SIZES[0], torch.float32)
    given = [torch.randn(1, 1, 1, 37)] if mask else []
    opcheck(ATTENTION, (*operands, given, False, 0.3))
