"""`lorafx::own_mask`: a mask whose positions take each request's own elements of a source.

    x (…), mask (…), source (…)      x.masked_scatter(mask, source), or x[mask] = source

The k-th position of a mask takes the k-th element of a source. Where the requests have equal parts
of both, one after another, the element is the request's own if each of them has as many positions
as elements. Values of the mask decide that, so it is asked when the graph runs, and only where
requests use different adapters.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lorafx.errors import BatchError
from lorafx.kernels.ops.op_library import define

SCHEMA = "own_mask(Tensor x, Tensor mask, Tensor source, Tensor slots) -> Tensor"


def own_mask(x: Tensor, mask: Tensor, source: Tensor, slots: Tensor) -> Tensor:
    """A copy of the mask.

    Args:
        x: what is written into; each entry of the mask stands for x.numel() / mask.numel() of it.
        mask: bool, an equal part of it for each request, in order.
        source: what is written, an equal part of it for each request, in order.
        slots: (n,) int32, one per request.

    Raises:
        BatchError: the requests use different adapters, and one of them has other than as many
            positions as elements.
    """
    requests = slots.shape[0]
    if requests > 1 and mask.numel() and bool((slots != slots[0]).any()):
        width = x.numel() // mask.numel()
        counts = (mask.reshape(requests, -1).sum(1) * width).tolist()
        each = source.numel() // requests
        odd = next((b for b, count in enumerate(counts) if count != each), None)
        if odd is not None:
            raise BatchError(
                f"this batch mixes adapters, and request {odd} has {counts[odd] // width} "
                "positions (image tokens, for example) where an equal share of the "
                f"features for each of the {requests} requests is {each // width}, so it is "
                "not known which request each feature belongs to. Give every request the "
                "same number of images, run one adapter per batch, or, where no adapter "
                "changes how the features are computed, declare that the requests share "
                "them: LoraConfig(row_dims={'pixel_values': None})"
            )
    return mask.clone()


def own_mask_fake(x, mask, source, slots):
    return torch.empty_like(mask)


define(SCHEMA, own_mask, own_mask_fake)
