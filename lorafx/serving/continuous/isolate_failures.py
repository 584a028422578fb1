"""Which requests of a step fail, where the step as a whole does.

    requests of a step that fails → halves → halves of those that fail → ...

A part is cut between adapters while it has several, and then between requests. A refusal (an error
of lorafx's, but for a token id outside of its table) is about an adapter, so all that its requests
have in the part fail with it; whatever else a model raises may be about one request. Each request
is served in one part, or fails.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable, Sequence
from typing import TypeVar

import torch

from lorafx.errors import LorafxError, OutOfRangeError

T = TypeVar("T")

#: Errors that a smaller part would have too: a device that is lost, or has no memory left.
OF_THE_DEVICE = (torch.AcceleratorError, torch.OutOfMemoryError)


def is_refusal(error: Exception) -> bool:
    """Whether an error is about an adapter; else it may be about one request."""
    return isinstance(error, LorafxError) and not isinstance(error, OutOfRangeError)


def in_parts(
    adapters: Sequence[Hashable],
    run: Callable[[Sequence[int]], T],
    error: Exception,
) -> tuple[list[tuple[Sequence[int], T]], dict[int, Exception]]:
    """What `run` returns for the parts that can be served, and why each other request fails.

    There are as many tries as find every adapter that is refused, or a few requests that fail;
    requests that have not been told apart by then fail.

    Args:
        adapters: of the requests, by their places in the step.
        run: runs a part of the step, given the places of its requests.
        error: with which the whole step failed.

    Raises:
        Errors of the device, from `run`.
    """
    first = {adapter: place for place, adapter in reversed([*enumerate(adapters)])}
    order = sorted(range(len(adapters)), key=lambda place: first[adapters[place]])
    tries = 2 * len(first) + 4 * len(order).bit_length()
    served: list[tuple[Sequence[int], T]] = []
    failed: dict[int, Exception] = {}
    left = deque([(half, error) for half in _halves(order, adapters, error)])
    if not left:
        failed.update(dict.fromkeys(order, error))
    while left:
        part, error = left.popleft()
        if tries:
            tries -= 1
            try:
                served.append((part, run(part)))
                continue
            except OF_THE_DEVICE:
                raise
            except Exception as own:
                error = own
            if halves := _halves(part, adapters, error):
                left += [(half, error) for half in halves]
                continue
        failed.update(dict.fromkeys(part, error))
    return served, failed


def _halves(
    part: Sequence[int], adapters: Sequence[Hashable], error: Exception
) -> list[Sequence[int]]:
    """The halves of a part that failed with `error`; none where all of it fails."""
    middle = len(part) / 2
    cuts = [at for at in range(1, len(part)) if adapters[part[at - 1]] != adapters[part[at]]]
    if not cuts and not is_refusal(error):
        cuts = [*range(1, len(part))]
    if not cuts:
        return []
    cut = min(cuts, key=lambda at: abs(at - middle))
    return [part[:cut], part[cut:]]
