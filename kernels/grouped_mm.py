"""`lorafx::grouped_mm`, the product of sorted rows with the weights of experts.

    y[m] = x[m] W_e    for offs[e - 1] ≤ m < offs[e],    0 behind the last

`aten._grouped_mm` where that has no kernel or cannot be compiled: on a CPU, and in other dtypes
than bfloat16. A loop over the experts that have rows; on an accelerator the host waits for offs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lorafx.kernels.op_library import define
from lorafx.kernels.ops import _require


def grouped_mm(x: Tensor, weight: Tensor, offs: Tensor) -> Tensor:
    """y (M, N).

    Args:
        x: (M, K), rows sorted by expert.
        weight: (E, K, N), in any layout.
        offs: int32 (E,), where the rows of each expert end; ascending.

    Raises:
        LoweringError: sizes or dtypes that do not fit together, or an end behind the last row.
    """
    _check(x, weight, offs)
    y = x.new_zeros(x.shape[0], weight.shape[2])
    start = 0
    for expert, end in enumerate(offs.tolist()):
        _require("grouped_mm", start <= end <= len(x), f"offs ends at {end}, of {len(x)} rows")
        if end > start:
            torch.mm(x[start:end], weight[expert], out=y[start:end])
        start = end
    return y


def grouped_mm_fake(x: Tensor, weight: Tensor, offs: Tensor) -> Tensor:
    _check(x, weight, offs)
    return x.new_empty(x.shape[0], weight.shape[2])


def _check(x: Tensor, weight: Tensor, offs: Tensor) -> None:
    op = "grouped_mm"
    _require(op, x.dim() == 2 and weight.dim() == 3, "input is (M, K), weight (E, K, N)")
    _require(op, x.shape[1] == weight.shape[1], f"x has {x.shape[1]} columns of {weight.shape[1]}")
    _require(op, offs.shape == weight.shape[:1], f"offs is (E,), not {tuple(offs.shape)}")
    _require(op, x.dtype == weight.dtype, f"x is {x.dtype}, weight {weight.dtype}")


define(
    "grouped_mm(Tensor input, Tensor weight, Tensor offs) -> Tensor", grouped_mm, grouped_mm_fake
)
