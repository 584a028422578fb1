"""Ops that declare or check facts that a trace cannot show: `rows_of`, `own_mask`, `checked_index`.

Generated code checks indices on several threads of a CPU, where an error ends the process.
`checked_index` runs before that code on the calling thread, and raises.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lorafx.errors import BatchError, OutOfRangeError
from lorafx.kernels.ops.op_library import check_rows, define, define_vmap


def rows_of(x: Tensor, y: Tensor) -> Tensor:
    """A copy of y (…, N), whose row m was computed from row m of x, (…, K) or ids (…), which the
    registry declares for a module that calls an unknown operator. `provenance` removes the op."""
    rows_of_fake(x, y)
    return y.clone()


def rows_of_fake(x: Tensor, y: Tensor) -> Tensor:
    rows = y.shape[:-1]
    check_rows("rows_of", x.shape[: len(rows)], rows, 1)
    return torch.empty_like(y)


def own_mask(x: Tensor, mask: Tensor, source: Tensor, slots: Tensor) -> Tensor:
    """A copy of the mask of x.masked_scatter(mask, source), or x[mask] = source.

    The k-th position takes the k-th element of the source. It belongs to the same request if each
    request has as many positions as elements. Raises BatchError if that does not hold and requests
    use different adapters. Mask and source have equally many entries of each request.
    """
    requests = slots.shape[0]
    if requests > 1 and mask.numel() and bool((slots != slots[0]).any()):
        width = x.numel() // mask.numel()
        counts = (mask.reshape(requests, -1).sum(1) * width).tolist()
        share = source.numel() // requests
        unequal = next((b for b, count in enumerate(counts) if count != share), None)
        if unequal is not None:
            raise BatchError(
                f"this batch mixes adapters, and request {unequal} has {counts[unequal] // width} "
                "positions (image tokens, for example) where an equal share of the "
                f"features for each of the {requests} requests is {share // width}, so it is "
                "not known which request each feature belongs to. Give every request the "
                "same number of images, run one adapter per batch, or, where no adapter "
                "changes how the features are computed, declare that the requests share "
                "them: LoraConfig(row_dims={'pixel_values': None})"
            )
    return mask.clone()


define("rows_of(Tensor x, Tensor y) -> Tensor", rows_of, rows_of_fake)
define(
    "own_mask(Tensor x, Tensor mask, Tensor source, Tensor slots) -> Tensor",
    own_mask,
    lambda x, mask, source, slots: torch.empty_like(mask),
)


def checked_index(
    index: Tensor, size: int, negative: bool, ignored: int | None, table: str, name: str
) -> Tensor:
    """A copy of `index`. Raises OutOfRangeError for an entry outside of a table of `size` entries,
    which begin at −size if `negative`; the entry `ignored` is allowed. `{}` in `name` is replaced
    by the position of the entry."""
    if not index.numel():
        return index.clone()
    first = -size if negative else 0
    low, high = (index, index) if index.numel() == 1 else index.aminmax()
    if first <= low.item() and high.item() < size:
        return index.clone()
    wrong = (index < first) | (index >= size)
    if ignored is not None:
        wrong &= index != ignored
    places = wrong.nonzero().tolist()
    if not places:
        return index.clone()
    position = f"[{', '.join(map(str, places[0]))}]" if places[0] else ""
    count = f" {len(places)} of {index.numel()} are outside." if len(places) > 1 else ""
    raise OutOfRangeError(
        f"{name.replace('{}', position)} is {int(index[tuple(places[0])])}, but {table} has {size} "
        f"entries: {first} to {size - 1}.{count}"
    )


def checked_index_vmap(info: Any, in_dims: Any, index: Tensor, *settings: Any) -> Any:
    return torch.ops.lorafx.checked_index(index, *settings), in_dims[0]


define(
    "checked_index(Tensor index, SymInt size, bool negative, int? ignored, str table, str name) "
    "-> Tensor",
    checked_index,
    lambda index, *_: torch.empty_like(index),
)
define_vmap("checked_index", checked_index_vmap)
CHECKED_INDEX = torch.ops.lorafx.checked_index.default
