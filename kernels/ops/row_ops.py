"""Ops that declare or check row ownership: `lorafx::rows_of` and `lorafx::own_mask`."""

from __future__ import annotations

import torch
from torch import Tensor

from lorafx.errors import BatchError
from lorafx.kernels.ops.op_checks import check_rows
from lorafx.kernels.ops.op_library import define


def rows_of(x: Tensor, y: Tensor) -> Tensor:
    """A copy of y (…, N), whose row m was computed from row m of x, (…, K) or ids (…), as the
    registry declares of a module around an unknown operator. `provenance` removes the op."""
    rows_of_fake(x, y)
    return y.clone()


def rows_of_fake(x: Tensor, y: Tensor) -> Tensor:
    rows = y.shape[:-1]
    check_rows("rows_of", x.shape[: len(rows)], rows, 1)
    return torch.empty_like(y)


def own_mask(x: Tensor, mask: Tensor, source: Tensor, slots: Tensor) -> Tensor:
    """A copy of the mask of x.masked_scatter(mask, source), or x[mask] = source.

    The k-th position takes the k-th element of the source, which is of the same request if each has
    as many positions as elements. Raises BatchError if not, and requests use different adapters.
    Mask and source have equally many entries of each request.
    """
    requests = slots.shape[0]
    if requests > 1 and mask.numel() and bool((slots != slots[0]).any()):
        width = x.numel() // mask.numel()
        counts = (mask.reshape(requests, -1).sum(1) * width).tolist()
        share = source.numel() // requests
        odd = next((b for b, count in enumerate(counts) if count != share), None)
        if odd is not None:
            raise BatchError(
                f"this batch mixes adapters, and request {odd} has {counts[odd] // width} "
                "positions (image tokens, for example) where an equal share of the "
                f"features for each of the {requests} requests is {share // width}, so it is "
                "not known which request each feature belongs to. Give every request the "
                "same number of images, run one adapter per batch, or, where no adapter "
                "changes how the features are computed, declare that the requests share "
                "them: LoraConfig(row_dims={'pixel_values': None})"
            )
    return mask.clone()


def own_mask_fake(x, mask, source, slots):
    return torch.empty_like(mask)


define("rows_of(Tensor x, Tensor y) -> Tensor", rows_of, rows_of_fake)
define(
    "own_mask(Tensor x, Tensor mask, Tensor source, Tensor slots) -> Tensor",
    own_mask,
    own_mask_fake,
)
