"""Labels of real tensors: the request of each element, by position.

    SHARED             no element depends on a request
    One(b)             every element belongs to request b, or to none
    Listed(dim, L)     index i along `dim` belongs to request L[i], to none if that is NOBODY
    Patchy(cells)      cells[...] is the request of each element
    POOL               elements of all requests, of which a mask shows each query its own

None stands for unknown owners. `cells` are int16 tensors that broadcast to the tensor's shape.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from lorafx.ownership.labels import One, Pooled

NOBODY, UNKNOWN = -1, -2
MOST_REQUESTS = torch.iinfo(torch.int16).max


@dataclass(frozen=True)
class Shared:
    """No element depends on a request. `of_weights`: they depend on weights that adapters may
    change, so in a later call they may be others."""

    of_weights: bool = False


@dataclass(frozen=True)
class Listed:
    """Index i along `dim` belongs to request owners[i]."""

    dim: int
    owners: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Patchy:
    """Element by element."""

    cells: Tensor


SHARED, OF_WEIGHTS, POOL = Shared(), Shared(of_weights=True), Pooled()
RealLabel: TypeAlias = Shared | One | Listed | Patchy | Pooled


def listed(dim: int, owners: tuple[int, ...]) -> RealLabel:
    """The label of index i along `dim` for request owners[i]; not `Listed` if all are equal."""
    if any(owner != owners[0] for owner in owners):
        return Listed(dim, owners)
    return SHARED if owners[0] == NOBODY else One(owners[0])


def settled(label: RealLabel | None) -> RealLabel | None:
    """The label, or One(b) if it lists request b and nobody: a row of nobody that a request has
    joined to its own is the request's."""
    requests = set(label.owners) - {NOBODY} if isinstance(label, Listed) else ()
    return One(min(requests)) if len(requests) == 1 else label


def repeated_owners(owners: tuple[int, ...], entries: Sequence[int]) -> tuple[int, ...] | None:
    """The owner of each of `entries` if every owner has equally many, adjacent; else None."""
    times, remainder = divmod(len(entries), len(owners))
    return None if remainder else tuple(owner for owner in owners for _ in range(times))


def cells_of(label: RealLabel | None, ndim: int, device: torch.device) -> Tensor:
    """Broadcastable cells of a tensor of `ndim` dimensions with this label."""
    if isinstance(label, Patchy):
        return label.cells
    if isinstance(label, Listed):
        sizes = [1] * ndim
        sizes[label.dim] = len(label.owners)
        return torch.tensor(label.owners, dtype=torch.int16, device=device).view(sizes)
    value = label.request if isinstance(label, One) else UNKNOWN
    value = NOBODY if isinstance(label, Shared) else value
    return torch.full([1] * ndim, value, dtype=torch.int16, device=device)


def label_of_cells(cells: Tensor) -> RealLabel | None:
    """The simplest label of these cells; None if an owner is unknown."""
    for dim, stride in enumerate(cells.stride()):
        if stride == 0:  # constant
            cells = cells.narrow(dim, 0, 1)
    if not cells.numel():
        return SHARED
    least, most = _least_and_most(cells, range(cells.dim()))
    lowest = int(cells.amin())
    if lowest == UNKNOWN:
        return None
    if int(most) == NOBODY:
        return SHARED
    single = int(least) == int(most)
    if single and lowest != NOBODY:
        return One(int(most))
    for dim in range(cells.dim()):
        others = [d for d in range(cells.dim()) if d != dim]
        least, most = _least_and_most(cells, others)
        if single and others:
            least = cells.amin(others)  # rows of nobody stay apart, or nothing is gained
        if bool(((least == most) | (most == NOBODY)).all()):
            return Listed(dim, tuple(most.tolist()))
    if single:
        return One(int(cells.amax()))
    return Patchy(cells.clone())  # a later write into these cells is not one into the label


def _least_and_most(cells: Tensor, dims: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The least and greatest request over `dims`; NOBODY is never the least."""
    if not dims:
        return cells, cells
    least = cells.masked_fill(cells == NOBODY, MOST_REQUESTS).amin(tuple(dims))
    return least, cells.amax(tuple(dims))


def joined(first: Tensor, second: Tensor) -> Tensor:
    """Cells of an elementwise result of two tensors."""
    first, second = torch.broadcast_tensors(first, second)
    agree = (first == second) | (second == NOBODY)
    return torch.where(first == NOBODY, second, torch.where(agree, first, UNKNOWN))


def renamed(label: RealLabel | None, requests: Mapping[int, int]) -> RealLabel | None:
    """The label with request b replaced by requests[b]."""
    if isinstance(label, One):
        return listed(0, (requests.get(label.request, label.request),))
    if isinstance(label, Listed):
        return listed(label.dim, tuple(requests.get(owner, owner) for owner in label.owners))
    return Patchy(renamed_cells(label.cells, requests)) if isinstance(label, Patchy) else label


def renamed_cells(cells: Tensor, requests: Mapping[int, int]) -> Tensor:
    """Cells with request b replaced by requests[b]; UNKNOWN and NOBODY are unchanged."""
    if not cells.numel():
        return cells
    table = torch.arange(UNKNOWN, max(int(cells.max()), *requests) + 1, dtype=torch.int16)
    for old, new in requests.items():
        table[old - UNKNOWN] = new
    return table.to(cells.device)[cells.long() - UNKNOWN]


def same_owners(lists: Sequence[tuple[int, ...]]) -> tuple[int, ...] | None:
    """The common list, if NOBODY matches any request; None if the lists differ."""
    if len({len(owners) for owners in lists}) != 1:
        return None
    if all(owners == lists[0] for owners in lists):
        return lists[0]
    common: list[int] = []
    for column in zip(*lists, strict=True):
        requests = {owner for owner in column if owner != NOBODY}
        if len(requests) > 1:
            return None
        common.append(requests.pop() if requests else NOBODY)
    return tuple(common)
