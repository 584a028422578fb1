"""The same values with other strides, and what a call allocates by torch's allocator."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

# --- layouts: the same values, other strides ---


def row_stride(t: Tensor) -> Tensor:
    return torch.cat([t, torch.full_like(t, torch.nan)], -1)[..., : t.shape[-1]]


def elements_apart(t: Tensor) -> Tensor:
    return torch.stack([t, torch.full_like(t, torch.nan)], -1)[..., 0]


def rows_apart(t: Tensor) -> Tensor:
    return torch.stack([t, torch.full_like(t, torch.nan)], -2)[..., 0, :]


def last_first(t: Tensor) -> Tensor:
    """Stored with the last dimension outermost: of a matrix, column by column."""
    return t.movedim(-1, 0).contiguous().movedim(0, -1)


def first_two_swapped(t: Tensor) -> Tensor:
    return t.transpose(0, 1).contiguous().transpose(0, 1)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "row stride": row_stride,
    "elements apart": elements_apart,
    "rows apart": rows_apart,
    "last first": last_first,
    "first two swapped": first_two_swapped,
}


def allocations(call: Callable[[], Any]) -> list[int]:
    """Bytes of each tensor that `call` allocates, by torch's allocator."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        call()
    events = record.profiler.kineto_results.events()
    return [event.nbytes() for event in events if event.name() == "[memory]" and event.nbytes() > 0]


def large(call: Callable[[], Any], least: int) -> int:
    """How many allocations of at least half of `least` bytes `call` makes."""
    return sum(size >= least // 2 for size in allocations(call))
