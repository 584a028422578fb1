"""Cells of what moves whole elements of real tensors: indexing, writing by indices, joining.

The values of the indices are known, so each element's owner goes where the element goes. A position
that a sort, or a search for what is not zero, returns belongs to whom the element there belongs to:
whose row stands where is order, not content.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lorafx.ownership.held import NOBODY, UNKNOWN, Held, cells_of, joined

aten = torch.ops.aten
Labels = Mapping[int, "Held | None"]  # by identity of the tensor


def cells_in(value: Tensor, labels: Labels) -> Tensor:
    """One cell an element."""
    return cells_of(labels[id(value)], value.dim(), value.device).expand(value.shape)


def moved(func: Any, named: Mapping[str, Any], result: Tensor, labels: Labels) -> Tensor:
    """An operator that says by numbers where elements go: it does so with their cells."""

    def cells(value: Any) -> Any:
        if isinstance(value, Tensor):
            return cells_in(value, labels)
        return [cells(item) for item in value] if isinstance(value, (list, tuple)) else value

    return func(**{name: cells(value) for name, value in named.items()})


def padded(func: Any, named: Mapping[str, Any], result: Tensor, labels: Labels) -> Tensor:
    return aten.constant_pad_nd(cells_in(named["self"], labels), named["pad"], NOBODY)


def positions(func: Any, named: Mapping[str, Any], result: Tensor, labels: Labels) -> Tensor:
    """nonzero: each position belongs to whom the element there belongs to."""
    cells = cells_in(named["self"], labels)[tuple(result.unbind(1))]
    return cells.unsqueeze(1).expand(result.shape)


def indexed(func: Any, named: Mapping[str, Any], result: Tensor, labels: Labels) -> Tensor:
    """x[indices], x.index_select(dim, index)."""
    index = Indices.of(named, labels)
    return index.owned(cells_in(named["self"], labels)[index.key])


def laid(func: Any, named: Mapping[str, Any], result: Tensor, labels: Labels) -> Tensor | None:
    """x[indices] = y, or += y: each element has y's owner where y lands. None where that is not
    one owner alone."""
    table, index = cells_in(named["self"], labels).clone(), Indices.of(named, labels)
    before = table[index.key]
    owners = cells_in(named.get("source", named.get("values")), labels).expand(before.shape)
    if named.get("accumulate") or func.overloadpacket is aten.index_add:
        owners = joined(before, owners)
    owners = index.owned(owners)
    table[index.key] = owners
    return None if bool((table[index.key] != owners).any()) else table


def masked(func: Any, named: Mapping[str, Any], result: Tensor, labels: Labels) -> Tensor | None:
    """x.masked_scatter(mask, source): each element has its owner in the source where it lands."""
    mask = named["mask"]
    whose = cells_in(mask, labels).expand(result.shape)
    mask, x = mask.expand(result.shape), cells_in(named["self"], labels).expand(result.shape)
    taken = cells_in(named["source"], labels).reshape(-1)[: int(mask.sum())]
    return joined(x.masked_scatter(mask, taken), whose)


class Indices:
    """The indices of a tensor by its dimensions, and the owners of each.

    Masks are taken as the positions that they choose.
    """

    def __init__(self, indices: Sequence[Tensor | None], labels: Labels) -> None:
        self.at: list[Tensor | None] = []
        self.cells: list[Tensor] = []
        self.masked: list[bool] = []
        for index in indices:
            if index is None:
                self.masked.append(False)
                self.at.append(None)
                self.cells.append(torch.empty(0))
                continue
            cells = cells_in(index, labels)
            if index.dtype in (torch.bool, torch.uint8):
                chosen = index.nonzero().unbind(1)
                self.at.extend(chosen)
                self.cells.extend([cells[tuple(chosen)]] * len(chosen))
                self.masked.extend([True] * len(chosen))
            else:
                self.at.append(index)
                self.masked.append(False)
                self.cells.append(cells)

    @staticmethod
    def of(named: Mapping[str, Any], labels: Labels) -> Indices:
        if "indices" in named:
            return Indices(named["indices"], labels)
        dim = named["dim"] % max(named["self"].dim(), 1)
        return Indices([None] * dim + [named["index"]], labels)

    @property
    def key(self) -> tuple[Any, ...]:
        return tuple(slice(None) if index is None else index.long() for index in self.at)

    def owned(self, picked: Tensor) -> Tensor:
        """`picked`, cells of table[indices], with the owners of the indices.

        What is of a request stays so where a mask of unknown owners leaves it in: which of the rows
        are left, in their order, is not their content.
        """
        places = [dim for dim, index in enumerate(self.at) if index is not None]
        together = places == list(range(places[0], places[0] + len(places)))
        count = max(index.dim() for index in self.at if index is not None)
        behind = picked.dim() - (places[0] if together else 0) - count
        for dim in places:
            cells = self.cells[dim]
            cells = cells.reshape(*cells.shape, *[1] * behind)
            if self.masked[dim]:
                cells = torch.where((cells == UNKNOWN) & (picked >= 0), NOBODY, cells)
            picked = joined(picked, cells)
        return picked


#: By the operator, or the one that computes what it writes in place.
MOVES: dict[object, Callable[[Any, Mapping[str, Any], Tensor, Labels], Tensor | None]] = {
    **dict.fromkeys(
        (aten.cat, aten.stack, aten.flip, aten.roll, aten.repeat, aten.slice_scatter), moved
    ),
    aten.constant_pad_nd: padded,
    aten.nonzero: positions,
    **dict.fromkeys((aten.index, aten._unsafe_index, aten.index_select), indexed),
    aten.masked_scatter: masked,
    **dict.fromkeys(
        (aten.index_put, aten._unsafe_index_put, aten.index_copy, aten.index_add), laid
    ),
}
