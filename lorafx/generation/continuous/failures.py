"""Which requests of a step fail, where the step as a whole does, and whether the engine is healthy.

    requests of a step that fails → halves → halves of those that fail → ...

Requests of one adapter stand together. A refusal is about an adapter, so a part of one that is
refused fails as a whole. Each request is served in one part, or fails.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import TypeVar

import torch
from transformers.generation.continuous_batching.requests import FutureRequestState

from lorafx.errors import (
    BatchError,
    CaptureError,
    LorafxError,
    LoweringError,
    OutOfRangeError,
    VerifyError,
)
from lorafx.generation.continuous.adapter_requests import hold_of
from lorafx.progress import LOG

T = TypeVar("T")

#: Errors that a smaller part would have too: a device that is lost, or has no memory left.
OF_THE_DEVICE = (torch.AcceleratorError, torch.OutOfMemoryError)
#: An engine whose last so many steps have failed is not healthy.
IN_A_ROW = 5


def is_refusal(error: Exception) -> bool:
    """Whether an error is about an adapter; else it may be about one request."""
    return isinstance(error, LorafxError) and not isinstance(error, OutOfRangeError)


def in_parts(
    adapters: Sequence[Hashable],
    run: Callable[[Sequence[int]], T],
    error: Exception,
) -> tuple[list[tuple[Sequence[int], T]], dict[int, Exception]]:
    """What `run` returns for the parts that can be served, given the places of their requests, and
    why each other request fails. Errors of the device are raised.

    Args:
        adapters: of the requests, by their places in the step.
        error: with which the whole step failed.
    """
    first = {adapter: place for place, adapter in reversed([*enumerate(adapters)])}
    order = sorted(range(len(adapters)), key=lambda place: first[adapters[place]])
    served: list[tuple[Sequence[int], T]] = []
    failed: dict[int, Exception] = {}

    def search(part: Sequence[int], error: Exception) -> None:
        refused = is_refusal(error) and len({adapters[place] for place in part}) == 1
        if refused or len(part) == 1:
            failed.update(dict.fromkeys(part, error))
            return
        middle = len(part) // 2
        for half in (part[:middle], part[middle:]):
            try:
                served.append((half, run(half)))
            except OF_THE_DEVICE:
                raise
            except Exception as of_half:
                search(half, of_half)

    search(order, error)
    return served, failed


class StepHealth:
    """What has become of the steps of an engine: how many have `failed`, how many of them
    `in_a_row`, and the `last` error. A step fails where none of its requests is served and the
    model, not what they ask for, is why."""

    def __init__(self) -> None:
        self.failed = 0
        self.in_a_row = 0
        self.last: Exception | None = None

    def succeeded(self) -> None:
        """A step has served at least one request."""
        self.in_a_row, self.last = 0, None

    def nobody_served(
        self, batch: Iterable[FutureRequestState], failed: Mapping[str, Exception]
    ) -> None:
        """All requests of a step have failed, with these errors by their names."""
        for future in batch:
            error = failed[future.state.request_id]
            if isinstance(error, FloatingPointError) and hold_of(future.state) is not None:
                continue  # logits that are not finite are the adapter's, as far as anybody knows
            of_the_model = isinstance(error, CaptureError | LoweringError | VerifyError)
            if of_the_model or not is_refusal(error):
                self.failed += 1
                self.in_a_row += 1
                self.last = error
                return

    def reason(self) -> str | None:
        """Why the engine is not healthy; None where it is. Without the error's text, which may
        hold what a request said."""
        if self.in_a_row < IN_A_ROW:
            return None
        return (
            f"The last {self.in_a_row} steps of the engine failed, the last one with "
            f"{type(self.last).__name__}; the log says more."
        )


def as_told(failed: Mapping[str, Exception]) -> dict[str, LorafxError]:
    """The errors of requests, by their names, as clients see them; the log has what was raised."""
    seen: dict[str, LorafxError] = {}
    causes: dict[int, Exception] = {}
    shared = Counter(map(id, failed.values()))
    for name, error in failed.items():
        if isinstance(error, LorafxError) and is_refusal(error):
            seen[name] = error
            continue
        causes[id(error)] = error
        others = " with others of its step" if shared[id(error)] > 1 else ""
        seen[name] = BatchError(
            f"this request failed{others}: the model, or how tokens are chosen, raised "
            f"{type(error).__name__}: {error}"
        )
    for error in causes.values():
        LOG.error("requests failed in a step of continuous batching", exc_info=error)
    return seen
