"""Labels of real tensors: the request of each element, by position.

    SHARED             no element depends on a request
    Alone(b)           every element belongs to request b, or to none
    Listed(dim, L)     index i along `dim` belongs to request L[i], to none where L[i] is NOBODY
    Patchy(cells)      cells[...] is the request of each element, irregularly

None stands for unknown owners. `cells` are int16 tensors that broadcast to the tensor's shape.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

NOBODY, UNKNOWN = -1, -2
MOST_REQUESTS = torch.iinfo(torch.int16).max


@dataclass(frozen=True)
class Shared:
    """No element depends on a request."""


@dataclass(frozen=True)
class Alone:
    """Every element belongs to this request, or to none."""

    request: int


@dataclass(frozen=True)
class Listed:
    """Index i along `dim` belongs to request owners[i]."""

    dim: int
    owners: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Patchy:
    """Element by element."""

    cells: Tensor


SHARED = Shared()
Held: TypeAlias = Shared | Alone | Listed | Patchy


def listed(dim: int, owners: tuple[int, ...]) -> Held:
    """Index i along `dim` belongs to request owners[i], which may be one for all."""
    if any(owner != owners[0] for owner in owners):
        return Listed(dim, owners)
    return SHARED if owners[0] == NOBODY else Alone(owners[0])


def each_repeated(owners: tuple[int, ...], entries: Sequence[int]) -> tuple[int, ...] | None:
    """The owners of `entries`, each owner's adjacent; None if uneven."""
    times, rest = divmod(len(entries), len(owners))
    return None if rest else tuple(owner for owner in owners for _ in range(times))


def cells_of(held: Held | None, ndim: int, device: torch.device) -> Tensor:
    """Broadcastable cells of a tensor of `ndim` dimensions with label `held`."""
    if isinstance(held, Patchy):
        return held.cells
    if isinstance(held, Listed):
        line = [1] * ndim
        line[held.dim] = len(held.owners)
        return torch.tensor(held.owners, dtype=torch.int16, device=device).view(line)
    value = UNKNOWN if held is None else held.request if isinstance(held, Alone) else NOBODY
    return torch.full([1] * ndim, value, dtype=torch.int16, device=device)


def held_by(cells: Tensor) -> Held | None:
    """The simplest label of these cells; None where some owner is unknown."""
    for dim, stride in enumerate(cells.stride()):
        if stride == 0:  # constant
            cells = cells.narrow(dim, 0, 1)
    if not cells.numel():
        return SHARED
    least, most = _ends(cells, range(cells.dim()))
    if int(cells.amin()) == UNKNOWN:
        return None
    if int(most) == NOBODY:
        return SHARED
    if int(least) == int(most):
        return Alone(int(most))
    for dim in range(cells.dim()):
        least, most = _ends(cells, [d for d in range(cells.dim()) if d != dim])
        if bool(((least == most) | (most == NOBODY)).all()):
            return Listed(dim, tuple(most.tolist()))
    return Patchy(cells)


def _ends(cells: Tensor, dims: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The least and greatest request over `dims`, ignoring NOBODY beside others."""
    if not dims:
        return cells, cells
    nowhere = cells == NOBODY
    least = cells.masked_fill(nowhere, MOST_REQUESTS).amin(tuple(dims))
    return least, cells.amax(tuple(dims))


def joined(one: Tensor, other: Tensor) -> Tensor:
    """Cells of an elementwise result of two tensors."""
    one, other = torch.broadcast_tensors(one, other)
    agree = (one == other) | (other == NOBODY)
    return torch.where(one == NOBODY, other, torch.where(agree, one, UNKNOWN))


def renamed(held: Held | None, requests: Mapping[int, int]) -> Held | None:
    """The label with requests[b] for b."""
    if isinstance(held, Alone):
        return listed(0, (requests.get(held.request, held.request),))
    if isinstance(held, Listed):
        return listed(held.dim, tuple(requests.get(owner, owner) for owner in held.owners))
    return Patchy(renamed_cells(held.cells, requests)) if isinstance(held, Patchy) else held


def renamed_cells(cells: Tensor, requests: Mapping[int, int]) -> Tensor:
    """As `renamed`, for cells; UNKNOWN and NOBODY stay."""
    if not cells.numel():
        return cells
    table = torch.arange(UNKNOWN, max(int(cells.max()), *requests) + 1, dtype=torch.int16)
    for before, now in requests.items():
        table[before - UNKNOWN] = now
    return table.to(cells.device)[cells.long() - UNKNOWN]


def same_owners(lists: Sequence[tuple[int, ...]]) -> tuple[int, ...] | None:
    """The common list, where NOBODY matches anybody; None where they differ."""
    if len({len(owners) for owners in lists}) != 1:
        return None
    if all(owners == lists[0] for owners in lists):
        return lists[0]
    found: list[int] = []
    for column in zip(*lists, strict=True):
        known = {owner for owner in column if owner != NOBODY}
        if len(known) > 1:
            return None
        found.append(known.pop() if known else NOBODY)
    return tuple(found)
