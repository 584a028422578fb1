"""What the generated kernels of a delta take for granted, in C++ and in Triton alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

#: What kernels are generated for.
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class DeltaSpec:
    """What a generated kernel takes for granted.

    Attributes:
        x_dtype: for an embedding ignored (ids may be int32 or int64).
        in_features: K; 0 for an embedding.
        max_rank: R of the bank.
        group: siblings of the bank, G; 0 where the tensors are not laid out as a bank is.
        columns: ΣN of the bank.
        siblings, offsets, sizes: the column ranges of y, as the ops take them. Where A, B, ranks
            and scales show some siblings of a larger bank, they count from the first shown.
        embedding: A is (S, V, R) and x holds ids.
        experts: E of a bank of E·S slots whose rows are routed (`run_expert_delta_`); 0 for others.
        spacing: rows of A and B from one slot to the next, 0 for `max_rank`. With fewer, slots
            overlap (lorafx.model.bank).
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
        siblings: list[int],
        offsets: list[int],
        sizes: list[int],
        experts: int = 0,
    ) -> DeltaSpec:
        """The spec of an `add_delta_` call; the tensors may be fake, only metadata is read."""
        group, columns, spacing = _bank_strides(A, B, ranks)
        return cls(
            x_dtype=x.dtype,
            bank_dtype=A.dtype,
            y_dtype=y.dtype,
            in_features=int(A.shape[2]) // max(int(ranks.shape[1]), 1),
            max_rank=int(B.shape[1]),
            group=group,
            columns=columns,
            siblings=tuple(siblings),
            offsets=tuple(offsets),
            sizes=tuple(sizes),
            experts=experts,
            spacing=spacing,
        )

    @classmethod
    def of_embedding(cls, y: Tensor, A: Tensor, B: Tensor) -> DeltaSpec:
        """The spec of an `add_embedding_delta_` call."""
        slots, R, columns = map(int, B.shape)
        spacing = int(B.stride(0)) // columns if slots > 1 and columns else R
        laid = _have(B, (spacing * columns, columns, 1)) and _have(A, (*A.stride()[:2], 1))
        return cls(
            x_dtype=A.dtype,
            bank_dtype=A.dtype,
            y_dtype=y.dtype,
            in_features=0,
            max_rank=R,
            group=int(laid),
            columns=columns,
            siblings=(0,),
            offsets=(0,),
            sizes=(columns,),
            embedding=True,
            spacing=_unless(R, spacing),
        )

    @property
    def slot_rows(self) -> int:
        """Rows of A and B from one slot to the next."""
        return self.spacing or self.max_rank

    @property
    def last_column(self) -> int:
        """Where the last of its columns ends in the bank, or in the part that is shown of it."""
        return max(offset + size for offset, size in zip(self.offsets, self.sizes, strict=True))

    def supported(self) -> bool:
        """Whether kernels are generated for it: 16- and 32-bit floats, nothing empty, a bank laid
        out as lorafx allocates it."""
        dtypes = (self.x_dtype, self.bank_dtype, self.y_dtype)
        return (
            all(dtype in FLOATS for dtype in dtypes)
            and self.max_rank > 0
            and self.group > 0
            and len(self.sizes) > 0
            and min(self.sizes) > 0
            and (self.embedding or self.in_features > 0)
        )


def _bank_strides(A: Tensor, B: Tensor, ranks: Tensor) -> tuple[int, int, int]:
    """(G, ΣN, spacing) of the bank that A, B and ranks are, or show some siblings of; (0, ·, ·)
    where their strides are those of no bank, such as a transposed B."""
    slots, R, shown = map(int, B.shape)
    siblings = int(ranks.shape[1])
    K = int(A.shape[2]) // max(siblings, 1)
    group = int(ranks.stride(0)) if slots > 1 else siblings
    columns = int(B.stride(1) if R > 1 else B.stride(0) if slots > 1 else shown)
    spacing = int(B.stride(0)) // max(columns, 1) if slots > 1 else R
    laid = (
        _have(A, (spacing * group * K, group * K, 1))
        and _have(B, (spacing * columns, columns, 1))
        and _have(ranks, (group, 1))
    )
    return (group if laid else 0), columns, _unless(R, spacing)


def _have(tensor: Tensor, strides: Sequence[int]) -> bool:
    """Whether it lies at these strides, those of dimensions of one entry apart."""
    triples = zip(tensor.shape, tensor.stride(), strides, strict=True)
    return all(size == 1 or have == want for size, have, want in triples)


def _unless(max_rank: int, spacing: int) -> int:
    """`DeltaSpec.spacing`, which is 0 for slots that do not overlap."""
    return 0 if spacing == max_rank else spacing
