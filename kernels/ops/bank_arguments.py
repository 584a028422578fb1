"""What an op takes of a bank: written once for all schemas, one argument of the functions behind
(lorafx.kernels.ops.flat_arguments).

    BankArgs    A, B, ranks, scales, slots       in a schema "Tensor A, Tensor B, …"
    Ranges      siblings, offsets, sizes         in a schema "int[] siblings, …"
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor


class BankArgs(NamedTuple):
    """The bank of one group and the owners of the rows; see lorafx.kernels.ops.ops for the
    shapes."""

    A: Tensor
    B: Tensor
    ranks: Tensor
    scales: Tensor
    slots: Tensor


class Ranges(NamedTuple):
    """The column ranges of y. The j-th has sizes[j] columns and gets the delta of siblings[j], by
    the columns of B from offsets[j] on."""

    siblings: Sequence[int]
    offsets: Sequence[int]
    sizes: Sequence[int]


BANK = ", ".join(f"Tensor {name}" for name in BankArgs._fields)
RANGES = ", ".join(f"int[] {name}" for name in Ranges._fields)
