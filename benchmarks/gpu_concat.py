"""Arms that make x and W longer, timed as they run in a compiled model.

There what computes x writes it into x' itself, so x' is filled beforehand. W' = [W | B] is copied
together at every call.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import gpu_compare
import torch
from gpu_cases import Case, Copy
from torch import Tensor

from lorafx.errors import LoweringError
from lorafx.kernels.triton.build import build, plan_of
from lorafx.kernels.triton.ops import columns_of

#: Requests of a batch of prompts, each with M / REQUESTS rows.
REQUESTS = 8


def concat(case: Case, device: torch.device) -> gpu_compare.ArmOfCopy:
    """The strategy "concat", W copied at every call.

    Raises:
        gpu_compare.Unfit: x and W cannot be made longer for this case.
    """
    kernels = {}
    for requests in (True, False):
        spec = replace(case.spec("concat"), by_request=requests)
        try:
            kernel = build(spec, "concat", rows_hint=case.rows, device=device)
        except LoweringError as reason:
            raise gpu_compare.Unfit(f"{case.label}: {reason}") from reason
        if kernel is None:
            raise gpu_compare.Unfit(f"{case.label}: no kernel is generated")
        kernels[requests] = kernel
    return lambda copy: _call(copy, kernels)


def _call(copy: Copy, kernels: dict[bool, int]) -> Callable[[], Tensor]:
    slots, rows = _requests(copy)
    # A block for each request, or for each slot where they are fewer.
    kernel = kernels[slots.shape[0] <= copy.B.shape[0]]
    spec = plan_of(kernel).spec
    more = (0, columns_of(spec, min(slots.shape[0], copy.B.shape[0])))
    x = torch.nn.functional.pad(copy.x, more)
    weight = torch.nn.functional.pad(copy.weight, more)
    y = torch.empty_like(copy.base())
    inside = weight[:, : spec.delta.in_features]
    bank = (copy.A, copy.B, copy.ranks, copy.scales, slots)

    def call() -> Tensor:
        inside.copy_(copy.weight)
        torch.ops.lorafx.triton_concat_(x, weight, *bank, rows, kernel)
        return torch.mm(x, weight.T, out=y)

    return call


def _requests(copy: Copy) -> tuple[Tensor, int]:
    """The slots of REQUESTS requests and the rows of each, where rows are alike so; else a request
    a row."""
    M = copy.owners.shape[0]
    if M % REQUESTS == 0:
        each = copy.owners.view(REQUESTS, -1)
        if bool((each == each[:, :1]).all()):
            return each[:, 0].contiguous(), M // REQUESTS
    return copy.owners, 1
