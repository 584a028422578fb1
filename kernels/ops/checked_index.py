"""`lorafx::checked_index`: a copy of an index, all of whose entries lie in a table.

    checked_index(index (…), size) = index        0 ≤ index < size, or −size ≤ index < size

Generated code checks an index on all threads of a CPU at once, where an error ends the process.
This op runs before that code, on the calling thread, and raises.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lorafx.errors import OutOfRangeError
from lorafx.kernels.ops.op_library import define, define_vmap


def refuse_outside(
    index: Tensor, size: int, negative: bool, ignored: int | None, table: str, name: str
) -> None:
    """Raise OutOfRangeError for an entry of `index` outside of a table of `size` entries, counted
    from −size on if `negative`; `ignored` is allowed. `{}` in `name` becomes the entry's place."""
    if not index.numel():
        return
    first = -size if negative else 0
    low, high = (index, index) if index.numel() == 1 else index.aminmax()
    if first <= low.item() and high.item() < size:
        return
    wrong = (index < first) | (index >= size)
    if ignored is not None:
        wrong &= index != ignored
    places = wrong.nonzero().tolist()
    if not places:
        return
    at = f"[{', '.join(map(str, places[0]))}]" if places[0] else ""
    count = f" {len(places)} of {index.numel()} are outside." if len(places) > 1 else ""
    raise OutOfRangeError(
        f"{name.replace('{}', at)} is {int(index[tuple(places[0])])}, but {table} has {size} "
        f"entries: {first} to {size - 1}.{count}"
    )


def checked_index(
    index: Tensor, size: int, negative: bool, ignored: int | None, table: str, name: str
) -> Tensor:
    refuse_outside(index, size, negative, ignored, table, name)
    return index.clone()


def checked_index_fake(index, size, negative, ignored, table, name):
    return torch.empty_like(index)


def checked_index_vmap(info: Any, in_dims: Any, index: Tensor, *settings: Any) -> Any:
    return torch.ops.lorafx.checked_index(index, *settings), in_dims[0]


define(
    "checked_index(Tensor index, SymInt size, bool negative, int? ignored, str table, str name) "
    "-> Tensor",
    checked_index,
    checked_index_fake,
)
define_vmap("checked_index", checked_index_vmap)
CHECKED_INDEX = torch.ops.lorafx.checked_index.default
