"""`lorafx::stored_grouped_mm` against one product a row with the dequantised weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from toolchain import needs_compiler
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lorafx.errors import LoweringError
from lorafx.kernels.cpu.stored_grouped_mm import stored_grouped_mm

op = torch.ops.lorafx.stored_grouped_mm
E, N, K = 4, 24, 64
#: Rows of each expert, of which one has none; two rows behind the last have no expert.
COUNTS, BEHIND = [3, 0, 1, 5], 2
Operands = tuple[Tensor, list[Tensor], Tensor, str, list[int], bool]


def blocks(table: Tensor, sizes: list[int]) -> Tensor:
    for dim, size in enumerate(sizes):
        table = table.repeat_interleave(size // table.shape[dim], dim)
    return table.double()


def affine(dtype: torch.dtype, per: tuple[int, int, int], zero: torch.dtype | None) -> Any:
    def make(sizes: list[int]) -> tuple[list[Tensor], str, Tensor]:
        q = torch.randint(-99, 99, sizes).to(dtype)
        shape = [size if part == 0 else part for size, part in zip(sizes, per, strict=True)]
        parts = [q, torch.rand(shape) / 50]
        W = q.double()
        if zero is not None:
            parts.append(torch.randint(-3, 3, shape).to(zero))
            W = W - blocks(parts[2], sizes)
        return parts, "affine", W * blocks(parts[1], sizes)

    return make


def four_bits(kind: str, *, nested: bool) -> Any:
    def make(sizes: list[int]) -> tuple[list[Tensor], str, Tensor]:
        library = pytest.importorskip("bitsandbytes.functional", reason="no bitsandbytes")
        q, state = library.quantize_4bit(
            torch.randn(sizes), compress_statistics=nested, quant_type=kind
        )
        W, form, parts = library.dequantize_4bit(q, state), f"{kind}/{state.blocksize}", [q]
        parts.append(state.absmax)
        if nested:
            form += f"/{state.state2.blocksize}"
            parts += [state.offset, state.state2.code, state.state2.absmax]
        return parts, form, W.view(sizes).double()

    return make


FORMATS = {
    "int8 by row": affine(torch.int8, (0, 0, 1), None),
    "int8 by row, zeros": affine(torch.int8, (0, 0, 1), torch.int8),
    "int8 by row of two experts": affine(torch.int8, (2, 0, 1), None),
    "int8 by tensor": affine(torch.int8, (1, 1, 1), None),
    "int8 by 32": affine(torch.int8, (0, 0, 2), torch.float32),
    "int8 by 8": affine(torch.int8, (0, 0, 8), torch.int8),
    "int8 by blocks": affine(torch.int8, (2, 4, 2), torch.int8),
    "fp8": affine(torch.float8_e4m3fn, (0, 0, 1), None),
    "nf4": four_bits("nf4", nested=False),
    "fp4, nested": four_bits("fp4", nested=True),
}


def operands(kind: str, *, turned: bool = False, sizes: tuple[int, int] = (N, K)) -> Any:
    """The operator's arguments, and W (E, N, K) in float64."""
    torch.manual_seed(0)
    shape = [E, *(sizes[::-1] if turned else sizes)]
    parts, form, W = FORMATS[kind](shape)
    x, offs = torch.randn(sum(COUNTS) + BEHIND, sizes[1]), torch.tensor(COUNTS).cumsum(0).int()
    return (x, parts, offs, form, shape, turned), W.mT if turned else W


def wanted(x: Tensor, W: Tensor, offs: Tensor) -> Tensor:
    y = torch.zeros(len(x), W.shape[1], dtype=torch.float64)
    for row in range(int(offs[-1])):
        y[row] = W[int(torch.searchsorted(offs, row, right=True))] @ x[row].double()
    return y


@pytest.mark.parametrize("turned", [False, True], ids=["N, K", "K, N"])
@pytest.mark.parametrize("kind", FORMATS)
def test_each_row_by_its_expert(kind: str, turned: bool) -> None:
    arguments, W = operands(kind, turned=turned)
    x, *others = arguments
    want = wanted(x, W, arguments[2])
    torch.testing.assert_close(op(*arguments).double(), want, rtol=1e-5, atol=1e-5)
    strided = torch.stack([x, x], dim=2).flatten(1)[:, ::2]
    assert torch.equal(op(strided, *others), op(*arguments))
    half = op(x.bfloat16(), *others)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.double(), want, rtol=0.1, atol=0.2)
    assert op(x[:0], *others[:1], torch.zeros(E, dtype=torch.int32), *others[2:]).shape == (0, N)


def test_blocks_that_two_experts_share() -> None:
    """Where no expert's numbers fill blocks of 64."""
    for kind in ("nf4", "fp4, nested"):
        arguments, W = operands(kind, sizes=(5, 10))
        want = wanted(arguments[0], W, arguments[2])
        torch.testing.assert_close(op(*arguments).double(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["int8 by row", "nf4"])
def test_opcheck(kind: str) -> None:
    arguments, _ = operands(kind)
    torch.library.opcheck(op.default, arguments)


class Largest(TorchDispatchMode):
    """The most bytes of floats that an operator has made."""

    found = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.is_floating_point():
            self.found = max(self.found, result.untyped_storage().nbytes())
        return result


@needs_compiler
@pytest.mark.parametrize("kind", ["int8 by row", "int8 by blocks", "fp8", "nf4"])
def test_one_expert_is_dequantised_at_a_time(kind: str) -> None:
    arguments, _ = operands(kind)
    with Largest() as largest:
        stored_grouped_mm(*arguments)
    one = 4 * N * K
    assert 0 < largest.found < one if kind == "int8 by row" else largest.found == one


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({2: torch.tensor([3, 3, 4, 99]).int()}, "ends at 99, of 11 rows"),
        ({2: torch.tensor([3, 2, 4, 9]).int()}, "ends at 2"),
        ({2: torch.tensor([3, 3, 9]).int()}, "offs is"),
        ({2: torch.tensor([3, 3, 4, 9])}, "int32"),
        ({0: torch.randn(11, 7)}, "7 columns"),
        ({3: "nf5/64"}, "no format nf5/64"),
        ({1: [torch.ones(E, N, K)]}, "two parts"),
        ({1: [torch.ones(E, N, K), torch.ones(3, N, 1)]}, "no format affine"),
    ],
    ids=str,
)
def test_wrong_arguments(change: dict[int, Any], match: str) -> None:
    arguments, _ = operands("int8 by row")
    with pytest.raises(LoweringError, match=match):
        op(*(change.get(index, value) for index, value in enumerate(arguments)))
