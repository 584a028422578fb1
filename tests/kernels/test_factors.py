"""Kernels of one adapter, factors as trained, against float64: sizes, dtypes, ISAs, layouts."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

import pytest
import torch
from toolchain import needs_compiler
from torch import Tensor

from lorafx.errors import LoweringError
from lorafx.kernels import factor_ops
from lorafx.kernels.compiler import Isa, runnable_isas
from lorafx.kernels.cpu import FactorSpec, build, build_all
from lorafx.kernels.factor_source import MAX_RANK, factor_source

lora = torch.ops.lorafx
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
TOLERANCE = {FP32: 2e-6, BF16: 6e-3, FP16: 8e-4}

# leading dimensions of x, K, rank, N
SIZES = {
    "one row": ((1,), 24, 4, 20),
    "decode": ((8, 1), 129, 16, 257),
    "odd": ((7,), 33, 5, 3),
    "rank 1": ((3,), 40, 1, 65),
    "whole squares": ((16,), 64, 32, 128),
    "one wide row": ((1,), 300, 70, 1700),  # threads share out its columns
    "prefill": ((2, 65), 100, 17, 300),
    "rank of several squares": ((9,), 33, 70, 90),
    "several panels": ((130,), 256, 16, 1100),
    "many columns": ((130,), 256, 70, 1700),
}
# dtypes of x, of A and B, of y
DTYPES = {
    "fp32": (FP32, FP32, FP32),
    "bf16": (BF16, BF16, BF16),
    "fp16": (FP16, FP16, FP16),
    "fp32 factors": (BF16, FP32, BF16),
    "bf16 factors": (FP32, BF16, FP32),
    "fp32 result": (BF16, BF16, FP32),
}


def problem(size: str, dtypes: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(y, x, A, B)"""
    torch.manual_seed(0)
    (leading, K, rank, N), (x, factors, y) = SIZES[size], DTYPES[dtypes]
    return (
        torch.randn(*leading, N).to(y),
        torch.randn(*leading, K).to(x),
        torch.randn(rank, K).div(K**0.5).to(factors),
        torch.randn(N, rank).div(rank**0.5).to(factors),
    )


def expected(y: Tensor, x: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    return y.double() + scale * (x.double() @ A.double().T @ B.double().T)


def assert_close(got: Tensor, want: Tensor) -> None:
    error = (got.double() - want).abs().max() / want.abs().max()
    assert error <= TOLERANCE[got.dtype]


def check(sizes: Iterable[tuple[str, str]], isa: Isa) -> None:
    for size, dtypes in sizes:
        tensors = problem(size, dtypes)
        y, want = tensors[0].clone(), expected(*tensors, 0.7)
        lora.run_factors_(y, *tensors[1:], 0.7, build(FactorSpec.of(*tensors), isa))
        assert_close(y, want)


@needs_compiler
@pytest.mark.parametrize("isa", runnable_isas(), ids=lambda isa: isa.name)
def test_against_float64(isa: Isa) -> None:
    """Every size, every dtype."""
    check(zip(SIZES, itertools.cycle(DTYPES), strict=False), isa)


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("isa", runnable_isas(), ids=lambda isa: isa.name)
def test_every_size_in_every_dtype(isa: Isa) -> None:
    check(itertools.product(SIZES, DTYPES), isa)


@pytest.mark.parametrize("dtypes", DTYPES)
def test_reference(dtypes: str) -> None:
    tensors = problem("prefill", dtypes)
    got = lora.factors(*tensors, 0.7)
    assert_close(got, expected(*tensors, 0.7))
    assert torch.equal(lora.factors(*tensors, torch.tensor(0.7)), got)
    y = tensors[0].clone()
    lora.add_factors_(y, *tensors[1:], 0.7)
    assert torch.equal(y, got)


@needs_compiler
def test_rows_are_independent() -> None:
    """A row's bits do not depend on how many rows stand beside it, or on the threads."""
    y, x, A, B = problem("many columns", "bf16")
    kernel = build(FactorSpec.of(y, x, A, B))
    together = y.clone()
    lora.run_factors_(together, x, A, B, 1.5, kernel)
    threads = torch.get_num_threads()
    try:
        for count, rows in [
            (1, slice(0, 1)),
            (1, slice(3, 12)),
            (2, slice(40, 129)),
            (2, slice(5, 6)),
        ]:
            torch.set_num_threads(count)
            alone = y[rows].clone()
            lora.run_factors_(alone, x[rows], A, B, 1.5, kernel)
            assert torch.equal(alone, together[rows])
    finally:
        torch.set_num_threads(threads)


@needs_compiler
def test_layouts_and_scales() -> None:
    """Strided x and y, and a scale that is a tensor."""
    y, x, A, B = problem("prefill", "fp32")
    kernel = build(FactorSpec.of(y, x, A, B))
    wide_y, wide_x = torch.randn(2, 65, 700), torch.randn(65, 100, 2).permute(2, 0, 1)
    part = wide_y[..., 100:400]
    want, outside = expected(part, wide_x, A, B, 0.3), wide_y[..., 400:].clone()
    lora.run_factors_.tensor(part, wide_x, A, B, torch.tensor(0.3), kernel)
    assert_close(part, want)
    assert torch.equal(wide_y[..., 400:], outside)


@needs_compiler
def test_wrong_operands_are_refused() -> None:
    y, x, A, B = problem("decode", "fp32")
    kernel = build(FactorSpec.of(y, x, A, B))
    bad = {
        "factors": (y, x, A.T.contiguous().T, B, 1.0, kernel),
        "columns": (y[..., 1:], x, A, B, 1.0, kernel),
        "features": (y, x[..., 1:], A, B, 1.0, kernel),
        "rows": (y[:2], x, A, B, 1.0, kernel),
        "id": (y, x, A, B, 1.0, kernel + 1),
    }
    for message, arguments in bad.items():
        with pytest.raises(RuntimeError, match=message):
            lora.run_factors_(*arguments)
    with pytest.raises(LoweringError, match="rank"):
        lora.factors(y, x, A[1:], B, 1.0)


def test_supported() -> None:
    y, x, A, B = problem("decode", "fp32")
    assert FactorSpec.of(y, x, A, B).supported()
    assert not FactorSpec.of(y, x, A.T.contiguous().T, B).supported()
    assert not FactorSpec.of(y, x, A, B.T.contiguous().T).supported()
    doubles = [t.double() for t in (y, x, A, B)]
    assert not FactorSpec.of(*doubles).supported()
    tall = torch.randn(MAX_RANK + 1, 129), torch.randn(257, MAX_RANK + 1)
    assert not FactorSpec.of(y, x, *tall).supported()


def test_source_is_of_the_sizes() -> None:
    text = factor_source(FactorSpec.of(*problem("decode", "bf16")), runnable_isas()[-1])
    for line in ("K = 129;", "R = 16;", "N = 257;", "#define W BF16"):
        assert line in text


def test_ops_pass_opcheck() -> None:
    y, x, A, B = problem("decode", "fp32")
    utilities = ("test_schema", "test_faketensor")
    torch.library.opcheck(lora.factors.default, (y, x, A, B, 0.5), test_utils=utilities)
    scale = torch.tensor(0.5)
    torch.library.opcheck(factor_ops.ADD_FACTORS.tensor, (y, x, A, B, scale), test_utils=utilities)


@needs_compiler
def test_built_together() -> None:
    specs = [FactorSpec.of(*problem(size, "fp32")) for size in ("odd", "rank 1")]
    kernels = build_all(specs)
    assert len(set(kernels.values())) == 2
    assert None not in kernels.values()
