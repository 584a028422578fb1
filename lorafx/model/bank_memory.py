"""The memory of a bank: where its tensors lie, and that of slots that overlap."""

from __future__ import annotations

import torch
from torch import Tensor

from lorafx.kernels.ops.own_rows import OwnRows


def by_factor(
    slots: int, rank: int, step: int, columns: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Zeros (S, R, columns), a slot `step` rows behind the one before it."""
    rows = (slots - 1) * step + rank
    strides = step * columns, columns, 1
    return _over(rows * columns, (slots, rank, columns), strides, dtype, device)


def by_token(
    slots: int, rank: int, step: int, tokens: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Zeros (S, V, R), a token's row of a slot `step` entries behind that of the slot before it;
    where slots do not overlap, the rows of a slot are together."""
    factors = (slots - 1) * step + rank
    strides = (tokens * rank, rank, 1) if step == rank else (step, factors, 1)
    return _over(tokens * factors, (slots, tokens, rank), strides, dtype, device)


def _over(
    entries: int,
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    """A tensor over memory of so many zeros. It is no view of another: graphs take it as it is."""
    memory = torch.zeros(entries, dtype=dtype, device=device)
    return torch.empty(0, dtype=dtype, device=device).set_(
        memory.untyped_storage(), 0, shape, strides
    )


def bytes_of(tensor: Tensor) -> int:
    """Bytes of memory from the first element to the last, which slots that overlap share."""
    pairs = zip(tensor.shape, tensor.stride(), strict=True)
    reach = 1 + sum((size - 1) * stride for size, stride in pairs)
    return reach * tensor.itemsize if tensor.numel() else 0


def by_column(slots: int, columns: int, device: torch.device) -> Tensor:
    """Zeros (S, columns), float32."""
    return torch.zeros((slots, columns), dtype=torch.float32, device=device)


def room_for_rows(
    kind: str,
    room: tuple[int, int, int],
    in_features: int,
    columns: int,
    dtype: torch.dtype,
    device: torch.device,
) -> OwnRows:
    """Room for (slots, adapters, rows of the weight), none of which is taken; nothing for 0."""
    slots, adapters, rows = room
    if not rows:
        return OwnRows()
    embedding = kind == "embedding"
    length, features = (in_features, columns) if embedding else (rows, in_features)
    return OwnRows(
        torch.zeros((adapters, rows, features), dtype=dtype, device=device),
        torch.full((adapters, length), -1, dtype=torch.int32, device=device),
        torch.full((slots, 2), -1, dtype=torch.int32, device=device),
        None if embedding else torch.zeros((adapters, rows), dtype=dtype, device=device),
    )
