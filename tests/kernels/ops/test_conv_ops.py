"""`lorafx::conv_site` against a dense convolution for each row in float64, and by opcheck."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.library import opcheck

from lorafx.errors import LoweringError, ProvenanceError

pytestmark = pytest.mark.quick

SLOTS, R, C, N = 3, 4, 3, 5
#: By name: (sizes of x, kernel, stride, pads).
WINDOWS: dict[str, tuple[list[int], list[int], list[int], list[int]]] = {
    "1d": ([9], [3], [2], [1, 1]),
    "2d": ([6, 7], [2, 3], [1, 2], [0, 0, 1, 1]),
    "2d, more zeros behind than before": ([5, 5], [2, 2], [1, 1], [0, 1, 0, 1]),
    "3d": ([3, 4, 5], [2, 2, 3], [1, 1, 2], [0, 0, 1, 1, 1, 1]),
}


def arguments(name: str, *, dtype: torch.dtype = torch.float32, dora: bool = False) -> list[Any]:
    """Everything that `conv_site` takes, for four requests of two rows."""
    torch.manual_seed(0)
    sizes, kernel, stride, pads = WINDOWS[name]
    A = torch.randn(SLOTS, R, C * math.prod(kernel))
    B = torch.randn(SLOTS, R, N)
    ranks = torch.tensor([[1], [4], [2]], dtype=torch.int32)
    slots = torch.tensor([1, -1, 0, 2], dtype=torch.int32)
    x = torch.randn(8, C, *sizes)
    out = [
        (size + pads[2 * d] + pads[2 * d + 1] - kernel[d]) // stride[d] + 1
        for d, size in enumerate(sizes)
    ]
    y = torch.randn(8, N, *out)
    gains, addend = torch.zeros(SLOTS, N), torch.randn(N)
    gains[1], shifts = torch.randn(N), torch.randn(SLOTS, N)
    tensors = [tensor.to(dtype) for tensor in (x, y, A, B)]
    scale = [gains, addend.to(dtype), shifts] if dora else [None, None, None]
    return [*tensors, ranks, torch.rand(SLOTS, 1) + 0.5, slots, 2, kernel, stride, pads, *scale]


def expected(args: list[Any]) -> Tensor:
    x, y, A, B, ranks, scales, slots, rows, kernel, stride, pads, gains, addend, shifts = args
    want = y.double().clone()
    sides = [n for d in reversed(range(len(kernel))) for n in pads[2 * d : 2 * d + 2]]
    convolution = (F.conv1d, F.conv2d, F.conv3d)[len(kernel) - 1]
    for m in range(len(x)):
        slot = int(slots[m // rows])
        if slot < 0:
            continue
        r = int(ranks[slot, 0])
        delta_w = float(scales[slot, 0]) * B[slot, :r].double().T @ A[slot, :r].double()
        weight = delta_w.view(N, C, *kernel)
        want[m] += convolution(F.pad(x[m : m + 1].double(), sides), weight, stride=stride)[0]
        if gains is not None:
            shape = (N, *[1] * len(kernel))
            c, gain = addend.double().view(shape), gains[slot].double().view(shape)
            want[m] += gain * (want[m] - c) + shifts[slot].double().view(shape)
    return want


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora and biases"])
@pytest.mark.parametrize("name", WINDOWS)
def test_every_window(name: str, dora: bool) -> None:
    args = arguments(name, dora=dora)
    before = args[1].clone()
    got = torch.ops.lorafx.conv_site(*args)
    torch.testing.assert_close(got.double(), expected(args), rtol=1e-5, atol=1e-5)
    assert torch.equal(args[1], before)
    assert torch.equal(got[2:4], before[2:4])  # base rows, bit for bit


def test_unproved_rows_and_misfits_are_told() -> None:
    args = arguments("2d")
    with pytest.raises(ProvenanceError, match="row ownership is not proved"):
        torch.ops.lorafx.conv_site(*args[:7], 0, *args[8:])
    with pytest.raises(LoweringError, match="A's outputs have another size"):
        torch.ops.lorafx.conv_site(*args[:9], [2, 2], *args[10:])
    with pytest.raises(LoweringError, match="A has 18 entries a row, x needs 27"):
        torch.ops.lorafx.conv_site(*args[:8], [3, 3], *args[9:])


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora and biases"])
def test_opcheck(dora: bool) -> None:
    result = opcheck(torch.ops.lorafx.conv_site, arguments("3d", dora=dora))
    assert set(result.values()) == {"SUCCESS"}
