"""One row times integers, by the digits of its numbers: nothing is rounded before sums are."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from toolchain import needs_compiler
from torch import Tensor

from lorafx.kernels.cpu.compiler import best_isa
from lorafx.kernels.cpu.weight_source import packed_block

lora, aten = torch.ops.lorafx, torch.ops.aten
DTYPES = [torch.bfloat16, torch.float16]
GROUP = 32

pytestmark = [needs_compiler, pytest.mark.skipif(not packed_block(), reason="no blocks")]


def weights(packed: bool, features: int, columns: int) -> tuple[list[Tensor], Tensor, Tensor]:
    """(arguments of weight_mm, W and |its parts| in float64)"""
    if packed:
        q = torch.randint(16, (columns, features), dtype=torch.int32)
        q[0] = 8  # whose number is 0
        factors = torch.randn(features // GROUP, columns, 2)
        scale, zero = (part.T.double().repeat_interleave(GROUP, 1) for part in factors.unbind(2))
        numbers = (q.double() - 8) * scale
        given = [aten._convert_weight_to_int4pack_for_cpu(q, 1), factors]
        return given, numbers + zero, numbers.abs() + zero.abs()
    q, scale = (
        torch.randint(-128, 128, (columns, features), dtype=torch.int8),
        torch.rand(columns, 1),
    )
    q[0] = 0
    W = q * scale.double()
    return [q, scale], W, W.abs()


def mm(x: Tensor, weight: list[Tensor], *, fixed: bool = False) -> Tensor:
    return lora.weight_mm(x, weight[0], None, None, weight[1], None, fixed)


@given(
    st.sampled_from(DTYPES),
    st.booleans(),
    st.sampled_from([32, 64, 512, 544, 1056]),
    st.sampled_from([16, 48, 64, 208]),
    st.integers(0, 60),
    st.integers(-100, 60),
    st.integers(0, 2**31),
)
def test_numbers_far_apart(
    dtype: torch.dtype, packed: bool, features: int, columns: int, span: int, top: int, seed: int
) -> None:
    """Each is more than 2 ** -126, below which instructions for bfloat16 know only 0."""
    torch.manual_seed(seed)
    x = torch.randn(1, features) * 2.0 ** (top - torch.randint(0, span + 1, (1, features)))
    x = x.where(x.abs() > 2.0**-120, 0).to(dtype)
    x = x.where(x.isfinite(), 1)
    weight, W, parts = weights(packed, features, columns)
    y, want = mm(x, weight).double(), x.double() @ W.T
    # y is rounded once; float32 sums are of chunks by digits, else of all numbers.
    sums = (features + 8) * 2.0**-23 * (x.double().abs() @ parts.T)
    error = torch.finfo(dtype).eps / 2 * want.abs() + sums + torch.finfo(dtype).smallest_normal
    overflows = want.abs() > torch.finfo(dtype).max
    assert ((y - want).abs() <= error)[~overflows].all()
    assert (y[:, 0] == 0).all() or packed  # a row of zeros


@pytest.mark.parametrize("packed", [False, True])
def test_sums_of_integers_are_exact(packed: bool) -> None:
    """Where float32 would lose the small terms between the large ones."""
    if not best_isa().dpbf16 or packed_block() != 64:
        pytest.skip("no products of bytes")
    x = torch.zeros(1, 64, dtype=torch.bfloat16)
    x[0, :4] = torch.tensor([2.0**30, 1.0, -(2.0**30), 2.0**-20])
    q = torch.full((64, 64), 9, dtype=torch.int32)
    ones = torch.tensor([1.0, 0.0], dtype=torch.bfloat16).expand(2, 64, 2).contiguous()
    packed_weight = [aten._convert_weight_to_int4pack_for_cpu(q, 1), ones]
    stored = [(q - 8).to(torch.int8), torch.ones(64, 1, dtype=torch.bfloat16)]
    y = mm(x, packed_weight if packed else stored)
    assert torch.equal(y, torch.full_like(y, 1.0))  # 1 + 2 ** -20 in bfloat16


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_what_has_no_digits(value: float, packed: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.randn(1, 1056).to(dtype)
    x[0, 700] = value
    weight, _, _ = weights(packed, 1056, 80)
    y = mm(x, weight)
    torch.testing.assert_close(y, mm(x, weight, fixed=True), equal_nan=True)
    assert not y.isfinite().any()
    assert mm(torch.zeros_like(x), weight).eq(0).all()
