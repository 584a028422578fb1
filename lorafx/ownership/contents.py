"""What tells whether the memory of a tensor is what it was.

    version     counts the writes that torch sees
    open        torch has given the memory out as a numpy array, which may be written into
    digest      of all its bytes: whatever else has its address (DLPack, `data_ptr`, an extension)
                writes unseen

    digest = Σ mix(w_i · (2 i + 1) · P)  mod 2⁶⁴        mix(x) = (x ^ (x >> 29)) · Q

over words w of 64 bits. Words count by their place, so rows that change places change the sum.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

_P, _Q = -7046029254386353131, -4658895280553007687
#: Words at a time, which stay in a core's cache.
_CHUNK = 1 << 17


class MemoryState(NamedTuple):
    """The state of a tensor's whole storage. `digest` is None where nobody asked for it."""

    version: int
    open: bool
    digest: int | None


def state_of(tensor: Tensor, *, digested: bool) -> MemoryState:
    """The state of the memory in which a tensor lies that counts its writes."""
    storage = tensor.untyped_storage()
    return MemoryState(
        tensor._version, not storage.resizable(), _digest(tensor) if digested else None
    )


@torch.no_grad()
def _digest(tensor: Tensor) -> int:
    storage = tensor.untyped_storage()
    device = storage.device
    if not storage.nbytes() or device.type == "meta":
        return 0
    octets = torch.empty(0, dtype=torch.uint8, device=device).set_(storage)
    rest = len(octets) % 8
    parts = list(octets[: len(octets) - rest].view(torch.int64).split(_CHUNK))
    if rest:
        parts.append(F.pad(octets[-rest:], (0, 8 - rest)).view(torch.int64))
    total = torch.zeros((), dtype=torch.int64, device=device)
    for part in parts:
        mixed = part * _weights(device)[: len(part)]
        mixed ^= mixed >> 29
        total = total * _P + (mixed * _Q).sum()
    return int(total)


@cache
def _weights(device: torch.device) -> Tensor:
    return (2 * torch.arange(_CHUNK, device=device) + 1) * _P
