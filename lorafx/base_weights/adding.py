"""W + ΔW, and writes in place."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lorafx.base_weights.deltas import Delta, blocks, computing
from lorafx.errors import MatchError
from lorafx.model.module_graph import writing

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@torch.no_grad()
def add_to(target: Tensor, weight: Tensor, delta: Delta, label: str) -> float:
    """target ← round(weight + ΔW), a few rows at a time; `target` may be the weight.

    Returns:
        ‖(target − weight) − ΔW‖ / ‖ΔW‖.

    Raises:
        MatchError: a sum is beyond the range of the dtype; `target` is written in part then.
    """
    dtype = computing(weight)
    lost = whole = 0.0
    for start, stop in blocks(weight.shape, weight.device):
        before = weight.detach()[start:stop].to(dtype, copy=True)
        update = delta.update(start, stop, before)
        after = (before + update).to(weight.dtype)
        wrong = after.to(dtype, copy=True).sub_(before).sub_(update)
        norms = torch.stack([torch.linalg.vector_norm(wrong), torch.linalg.vector_norm(update)])
        block_lost, block_whole = norms.tolist()  # one transfer a block
        if not math.isfinite(block_lost) and _overflown(before, after):
            raise MatchError(
                f"{label}: W + ΔW is beyond the range of {weight.dtype}; nothing is merged"
            )
        lost, whole = lost + block_lost**2, whole + block_whole**2
        write(target.detach()[start:stop], after)
    return (lost / whole) ** 0.5 if whole else 0.0


def _overflown(before: Tensor, after: Tensor) -> bool:
    """Whether finite numbers have become infinite, or none."""
    return bool((~torch.isfinite(after) & torch.isfinite(before)).any())


def write(target: Tensor, value: Tensor) -> None:
    """Write in place."""
    with writing(target):
        target.detach().copy_(value)


@torch.no_grad()
def mark_of(tensor: Tensor) -> int:
    """A sum over the bits of all numbers, which changes with any one of them, but not where numbers
    change places. torch's own count of writes misses those through `.data`, and tensors of
    inference mode have none."""
    bits = tensor.detach().view(_BITS[tensor.element_size()])
    words = 8 // bits.element_size()
    if bits.is_contiguous() and not bits.numel() % words and not bits.storage_offset() % words:
        bits = bits.reshape(-1).view(torch.int64)  # summed as it is: much faster than widened
    return int(bits.sum(dtype=torch.int64))
