"""`lorafx::grouped_mm` against one product a row."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from slowly import each
from toolchain import needs_compiler
from torch import Tensor

from lorafx.errors import LorafxWarning, LoweringError
from lorafx.kernels.cpu import grouped_mm
from lorafx.kernels.cpu.compiler import Isa, runnable_isas
from lorafx.kernels.cpu.grouped_mm import ProductSpec

K, N = 5, 3
op = torch.ops.lorafx.grouped_mm
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def operands(
    counts: list[int],
    dtype: torch.dtype,
    *,
    behind: int = 0,
    transposed: bool = True,
    sizes: tuple[int, int] = (K, N),
) -> list[Tensor]:
    """(x, weight, offs); `transposed`: the weights lie as (E, N, K)."""
    torch.manual_seed(0)
    x = torch.randn(sum(counts) + behind, sizes[0]).to(dtype)
    weight = torch.randn(len(counts), *sizes).to(dtype)
    if transposed:
        weight = weight.transpose(1, 2).contiguous().transpose(1, 2)
    return [x, weight, torch.tensor(counts).cumsum(0).to(torch.int32)]


def check(got: Tensor, x: Tensor, weight: Tensor, offs: Tensor) -> None:
    """Within the rounding of K products, their float32 sums and the result (Higham, Accuracy and
    Stability of Numerical Algorithms, 3.1 and 3.5); zero where no expert's row is."""
    assert got.dtype == x.dtype
    precise, sums = torch.finfo(x.dtype).eps, torch.finfo(torch.float32).eps
    start = 0
    for expert, end in enumerate(offs.tolist()):
        rows, columns = x[start:end].double(), weight[expert].double()
        want, size = rows @ columns, rows.abs() @ columns.abs()
        bound = precise * want.abs() + (x.shape[1] + 1) * min(sums, precise) * size + 1e-7
        assert bool(((got[start:end].double() - want).abs() <= bound).all())
        start = end
    assert not got[start:].any()


@given(
    counts=st.lists(st.integers(0, 9), min_size=1, max_size=6),
    behind=st.integers(0, 2),
    dtype=st.sampled_from([torch.float64, *DTYPES]),
    transposed=st.booleans(),
)
def test_each_row_by_its_expert(counts, behind, dtype, transposed):
    x, weight, offs = operands(counts, dtype, behind=behind, transposed=transposed)
    check(op(x, weight, offs), x, weight, offs)


@needs_compiler
@pytest.mark.parametrize("dtype", each(2, DTYPES), ids=str)
@pytest.mark.parametrize("isa", runnable_isas(), ids=lambda isa: isa.name)
@pytest.mark.parametrize("sizes", [(1, 1), (40, 130), (129, 64)], ids=str)
def test_generated_kernels(isa: Isa, dtype: torch.dtype, sizes: tuple[int, int]) -> None:
    """Tiles of every height, columns that fill no unit or vector, features that fill no step."""
    x, weight, offs = operands([0, 1, 13, 2, 0, 5, 64], dtype, behind=1, sizes=sizes)
    spec = ProductSpec.of(x, weight)
    assert spec == ProductSpec(dtype, *sizes)
    y = torch.zeros(len(x), sizes[1], dtype=dtype)
    grouped_mm.run(y, x, weight, offs, *grouped_mm.GENERATED.load(spec, isa))
    check(y, x, weight, offs)


@needs_compiler
def test_rows_are_the_same_whatever_their_neighbours_are() -> None:
    x, weight, offs = operands([3, 20, 9], torch.float32, sizes=(70, 90))
    together = op(x, weight, offs)
    for row in (1, 3, 17, 22, 30):
        expert = int((offs <= row).sum())
        alone = torch.tensor([0] * expert + [1] * (3 - expert), dtype=torch.int32)
        assert torch.equal(op(x[row : row + 1], weight, alone)[0], together[row])


@pytest.mark.usefixtures("refused_sources")
def test_many_rows_and_a_refused_source(monkeypatch) -> None:
    """A product of matrices for each expert."""
    x, weight, offs = operands([3, 0, 9], torch.float32)
    with pytest.warns(LorafxWarning, match="stay with aten: refused"):
        check(op(x, weight, offs), x, weight, offs)
    monkeypatch.setattr(grouped_mm, "MANY_ROWS", 4)
    check(op(x, weight, offs), x, weight, offs)


def test_opcheck():
    arguments = operands([2, 0, 3], torch.float32, behind=1)
    assert set(torch.library.opcheck(op.default, arguments).values()) == {"SUCCESS"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, w, o: (x[:, :-1], w, o), "4 columns, weight has 5"),
        (lambda x, w, o: (x, w[0], o), "weight \\(E, K, N\\)"),
        (lambda x, w, o: (x, w, o[:-1]), r"offs is \(E,\), not \(2,\)"),
        (lambda x, w, o: (x[:-2], w, o), "offs ends at 5, of 4 rows"),
    ],
)
def test_bad_operands(change, message):
    with pytest.raises(LoweringError, match=message):
        op(*change(*operands([2, 0, 3], torch.float32, behind=1)))
