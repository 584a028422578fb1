"""Dtypes, sizes and layout for which a kernel of a delta is generated, in C++ and in Triton."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

#: Kernels are generated for these.
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class DeltaSpec:
    """The constants of a generated kernel.

    Attributes:
        in_features: K; 0 for an embedding.
        group: siblings of the bank, G; 0 if the tensors do not have the layout of a bank.
        columns: ΣN of the bank.
        siblings, offsets, sizes: the column ranges of y, as the ops take them, counted from the
            first sibling in A, B, ranks and scales, which may be slices of the bank.
        embedding: whether A is (S, V, R) and x holds ids, int32 or int64.
        experts: E of a bank of E·S slots whose rows are routed; 0 for other banks.
        spacing: rows of A and B from one slot to the next; 0 for `max_rank`.
    """

    x_dtype: torch.dtype
    bank_dtype: torch.dtype
    y_dtype: torch.dtype
    in_features: int
    max_rank: int
    group: int
    columns: int
    siblings: tuple[int, ...]
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    embedding: bool = False
    experts: int = 0
    spacing: int = 0

    @classmethod
    def linear(
        cls,
        y: Tensor,
        x: Tensor,
        A: Tensor,
        B: Tensor,
        ranks: Tensor,
        *ranges: Sequence[int],
        experts: int = 0,
    ) -> DeltaSpec:
        """The spec of an `add_delta_` call; the tensors may be fake."""
        R, K = int(B.shape[1]), int(A.shape[2]) // max(int(ranks.shape[1]), 1)
        group, columns, spacing = _bank_strides(A, B, ranks, K)
        siblings, offsets, sizes = map(tuple, ranges)
        layout = (group, columns, siblings, offsets, sizes)
        return cls(x.dtype, A.dtype, y.dtype, K, R, *layout, experts=experts, spacing=spacing)

    @classmethod
    def of_embedding(cls, y: Tensor, A: Tensor, B: Tensor) -> DeltaSpec:
        """The spec of an `add_embedding_delta_` call."""
        slots, R, columns = map(int, B.shape)
        spacing = int(B.stride(0)) // columns if slots > 1 and columns else R
        has_layout = have_strides(B, (spacing * columns, columns, 1)) and have_strides(
            A, (*A.stride()[:2], 1)
        )
        layout = (int(has_layout), columns, (0,), (0,), (columns,))
        spacing = 0 if spacing == R else spacing
        return cls(A.dtype, A.dtype, y.dtype, 0, R, *layout, embedding=True, spacing=spacing)

    @property
    def slot_rows(self) -> int:
        return self.spacing or self.max_rank

    @property
    def last_column(self) -> int:
        """The end of the last column in the bank, or in the slice of it that the op takes."""
        return max(offset + size for offset, size in zip(self.offsets, self.sizes, strict=True))

    def supported(self) -> bool:
        """Whether kernels are generated: 16- and 32-bit floats, nothing empty, a bank's layout."""
        return (
            {self.x_dtype, self.bank_dtype, self.y_dtype} <= set(FLOATS)
            and self.max_rank > 0
            and self.group > 0
            and len(self.sizes) > 0
            and min(self.sizes) > 0
            and (self.embedding or self.in_features > 0)
        )


def _bank_strides(A: Tensor, B: Tensor, ranks: Tensor, K: int) -> tuple[int, int, int]:
    """(G, ΣN, spacing) of the bank of these tensors; G is 0 if their strides are not a bank's."""
    slots, R, width = map(int, B.shape)
    group = int(ranks.stride(0) if slots > 1 else ranks.shape[1])
    columns = int(B.stride(1) if R > 1 else B.stride(0) if slots > 1 else width)
    spacing = int(B.stride(0)) // max(columns, 1) if slots > 1 else R
    has_layout = (
        have_strides(A, (spacing * group * K, group * K, 1))
        and have_strides(B, (spacing * columns, columns, 1))
        and have_strides(ranks, (group, 1))
    )
    return (group if has_layout else 0), columns, (0 if spacing == R else spacing)


def have_strides(tensor: Tensor, strides: Sequence[int]) -> bool:
    """Whether `tensor` has these strides, except in dimensions of size one."""
    triples = zip(tensor.shape, tensor.stride(), strides, strict=True)
    return all(size == 1 or have == want for size, have, want in triples)
