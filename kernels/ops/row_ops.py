"""`lorafx::rows_of`: y, whose row m was computed from row m of x, whatever computed it.

    rows_of(x, y) = y        x (…, K) or ids (…), y (…, N), the same leading sizes

A library's kernel over a quantised weight is an operator that nobody here knows. That the module
around it computes y = x Wᵀ is what the registry says of its class, and all that LoRA there rests
on; this op says it in the graph, for the analysis of whose rows are whose, which takes it away.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lorafx.kernels.ops.op_checks import check_rows
from lorafx.kernels.ops.op_library import define

SCHEMA = "rows_of(Tensor x, Tensor y) -> Tensor"


def rows_of(x: Tensor, y: Tensor) -> Tensor:
    """A copy of y (…, N).

    Raises:
        BatchError: x, (…, K) or ids (…), has other rows.
    """
    _check(x, y)
    return y.clone()


def rows_of_fake(x, y):
    _check(x, y)
    return torch.empty_like(y)


def _check(x: Tensor, y: Tensor) -> None:
    rows = y.shape[:-1]
    check_rows("rows_of", x.shape[: len(rows)], rows, 1)


define(SCHEMA, rows_of, rows_of_fake)
