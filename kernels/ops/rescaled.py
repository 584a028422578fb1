"""DoRA's scale of each output, and biases that adapters add, in plain aten: what the graphs of
every lowering compute.

    y[m, n] ← y[m, n] + G[s, n] · (y[m, n] − c[n])        s = slot of row m

y = W x + s·B A x + c holds the low-rank delta already, c is what else is in it (the bias), and
G = m / ‖W + s·B A‖ − 1 by output, so that y becomes c + m / ‖W + s·B A‖ · (W x + s·B A x). Rows
whose slot is negative, and outputs where G is 0, are left as they are, bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lorafx.kernels.ops.delta import accumulation_dtype, row_slots


def rescaled(
    y: Tensor,
    gains: Tensor | None,
    addend: Tensor | None,
    slots: Tensor,
    rows: int,
    offsets: Sequence[int],
    sizes: Sequence[int],
    shifts: Tensor | None = None,
) -> Tensor:
    """y (..., Σsizes) rescaled by the columns [offset, offset + size) of gains (S, ΣN), then with
    those of shifts (S, ΣN) added; None for either leaves it out.

    Raises:
        ProvenanceError, BatchError: as `lorafx.kernels.ops.delta.row_slots`.
    """
    owner = row_slots(slots, rows, y.shape[:-1].numel()).view(y.shape[:-1])

    def columns(table: Tensor) -> Tensor:
        return torch.cat([table[:, o : o + n] for o, n in zip(offsets, sizes, strict=True)], 1)

    if gains is not None:
        y = rescaled_rows(y, columns(gains), addend, owner)
    return y if shifts is None else shifted_rows(y, columns(shifts), owner)


def rescaled_rows(y: Tensor, gains: Tensor, addend: Tensor | None, owner: Tensor) -> Tensor:
    """y (..., N) rescaled by gains (S, N), given the slots of its rows: owner (...), whose sizes
    may be 1 where those of y are not."""
    gain = gains[owner]  # -1 reads the last slot, for nothing
    wide = y.to(accumulation_dtype(y))
    product = wide if addend is None else wide - addend
    live = (owner >= 0).unsqueeze(-1) & (gain != 0)
    return torch.where(live, (wide + gain * product).to(y.dtype), y)


def shifted_rows(y: Tensor, shifts: Tensor, owner: Tensor) -> Tensor:
    """y (..., N) + shifts[s] of shifts (S, N), given the slots of its rows as `rescaled_rows` takes
    them: the biases that adapters add. Other rows, and outputs where it is 0, keep their bits."""
    shift = shifts[owner]
    live = (owner >= 0).unsqueeze(-1) & (shift != 0)
    return torch.where(live, (y.to(accumulation_dtype(y)) + shift).to(y.dtype), y)
