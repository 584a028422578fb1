"""Shapes that the interpreter has seen are not made again: results, refusals and Triton's own types
are as without."""

from __future__ import annotations

import inspect

import pytest
import torch
import triton
import triton.language as tl

from lorafx.errors import LoweringError
from lorafx.kernels.triton.triton_compat import interpret


@triton.jit
def table(x, y, out, M: tl.constexpr, N: tl.constexpr):
    rows = tl.arange(0, M)[:, None]
    columns = tl.arange(0, N)[None, :]
    kept = (rows < M - 1) & (columns >= 1)
    values = tl.load(x + rows) * 2.0 + tl.load(y + columns)
    bias = tl.load(y + tl.arange(0, N))  # of one dimension, beside one of two
    tl.store(out + rows * N + columns, tl.where(kept, values + bias, -1.0))


@triton.jit
def unlike(x, y, out, M: tl.constexpr, N: tl.constexpr):
    tl.store(out + tl.arange(0, M), tl.load(x + tl.arange(0, M)) + tl.load(y + tl.arange(0, N)))


@triton.jit
def odd(x, y, out, M: tl.constexpr, N: tl.constexpr):
    tl.store(out, tl.sum(tl.full((M, N - 1), 0.0, tl.float32)))


@pytest.mark.parametrize(("M", "N"), [(4, 8), (8, 4), (1, 8), (4, 4)])
def test_values_of_any_shapes(M: int, N: int) -> None:
    x, y, out = torch.randn(M), torch.randn(N), torch.zeros(M, N)
    for _ in range(2):
        interpret(table, (1,), (x, y, out, M, N))
    want = x[:, None] * 2 + y + y
    kept = torch.zeros(M, N, dtype=torch.bool)
    kept[: M - 1, 1:] = True
    assert torch.allclose(out, torch.where(kept, want, torch.tensor(-1.0)))


@pytest.mark.parametrize(("kernel", "words"), [(unlike, "incompatible dim"), (odd, "power of 2")])
def test_what_triton_refuses_is_refused_each_time(kernel, words: str) -> None:
    x, y, out = torch.ones(4), torch.ones(8), torch.zeros(4)
    interpret(table, (1,), (x, y, torch.zeros(4, 8), 4, 8))
    for _ in range(2):
        with pytest.raises(LoweringError, match=words):
            interpret(kernel, (1,), (x, y, out, 4, 8))
    assert not out.any()


def test_the_compilers_own_types_are_left_alone() -> None:
    interpret(table, (1,), (torch.ones(4), torch.ones(8), torch.zeros(4, 8), 4, 8))
    for own in (tl.block_type, tl.tensor):
        assert inspect.getfile(own.__init__) == tl.core.__file__
