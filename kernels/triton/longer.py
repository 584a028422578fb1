"""How x and W are made longer so that one product holds the deltas: which columns are whose.

    x' = [ x | v of each sibling ]      W' = [ W | B of each sibling ]

A sibling has `blocks` blocks of `width` columns, a block for each slot of the bank or for each
request. A row's v is in its own block, the rest of its columns are 0, and W' is 0 in the columns of
other siblings.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lorafx.kernels.ops.delta_spec import DeltaSpec

#: Elements that columns come in: what a matrix instruction takes of K, and 32 bytes.
UNIT = 16


@dataclass(frozen=True)
class Longer:
    """A choice of columns.

    Attributes:
        requests: a block for each request of the batch, instead of each slot of the bank.
    """

    requests: bool = False


def width_of(rank: int) -> int:
    """Columns of a block for adapters of up to `rank`."""
    return -(-rank // UNIT) * UNIT


def refusal(delta: DeltaSpec, weight_dtype: torch.dtype | None) -> str:
    """Why x and W cannot be made longer; "" where they can."""
    dtypes = {delta.x_dtype, delta.bank_dtype, delta.y_dtype, weight_dtype}
    if len(dtypes) != 1:
        return "x, W, the bank and y are not of one type"
    if delta.x_dtype == torch.float16:
        return "x A may overflow float16"
    if delta.in_features % UNIT:
        return f"K is {delta.in_features}, not a multiple of {UNIT}"
    return ""
