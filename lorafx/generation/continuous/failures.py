"""Which requests of a failed step fail, and whether the engine is healthy.

    requests of a step that fails → halves → halves of those that fail → ...

Requests of one adapter are next to each other. A refusal is about an adapter, so a part with only
one adapter that is refused fails as a whole. Each request is served in exactly one part, or fails.
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

#: Errors that a smaller part would have too: the device is lost, or out of memory.
DEVICE_ERRORS = (torch.AcceleratorError, torch.OutOfMemoryError)
#: An engine is not healthy if this many steps in a row, or more, have failed.
IN_A_ROW = 5


def is_refusal(error: Exception) -> bool:
    """Whether an error is about an adapter. Any other error may be about one request."""
    return isinstance(error, LorafxError) and not isinstance(error, OutOfRangeError)


def in_parts(
    adapters: Sequence[Hashable],
    run: Callable[[Sequence[int]], T],
    error: Exception,
) -> tuple[list[tuple[Sequence[int], T]], dict[int, Exception]]:
    """The parts of a step that can be served, with the results of `run`, and the error of each
    other request. Requests are numbered by their indices in the step. DEVICE_ERRORS are raised.

    Args:
        adapters: the adapter of each request.
        run: runs a part, given its requests.
        error: the error of the whole step.
    """
    first = {adapter: index for index, adapter in reversed([*enumerate(adapters)])}
    order = sorted(range(len(adapters)), key=lambda index: first[adapters[index]])
    served: list[tuple[Sequence[int], T]] = []
    failed: dict[int, Exception] = {}

    def search(part: Sequence[int], error: Exception) -> None:
        refused = is_refusal(error) and len({adapters[index] for index in part}) == 1
        if refused or len(part) == 1:
            failed.update(dict.fromkeys(part, error))
            return
        middle = len(part) // 2
        for half in (part[:middle], part[middle:]):
            try:
                served.append((half, run(half)))
            except DEVICE_ERRORS:
                raise
            except Exception as half_error:
                search(half, half_error)

    search(order, error)
    return served, failed


class StepHealth:
    """The steps of an engine that `failed`, those of them since the last success (`in_a_row`), and
    the `last` error. A step fails if the model is the reason why none of its requests is served."""

    def __init__(self) -> None:
        self.failed = 0
        self.in_a_row = 0
        self.last: Exception | None = None

    def succeeded(self) -> None:
        """Record a step that has served at least one request."""
        self.in_a_row, self.last = 0, None

    def nobody_served(
        self, batch: Iterable[FutureRequestState], failed: Mapping[str, Exception]
    ) -> None:
        """Record a step whose requests have all failed; `failed` has their errors by name."""
        for future in batch:
            error = failed[future.state.request_id]
            if isinstance(error, FloatingPointError) and hold_of(future.state) is not None:
                continue  # logits that are not finite are probably due to the adapter
            model_fails = isinstance(error, CaptureError | LoweringError | VerifyError)
            if model_fails or not is_refusal(error):
                self.failed += 1
                self.in_a_row += 1
                self.last = error
                return

    def reason(self) -> str | None:
        """Why the engine is not healthy; None if it is. The text of the last error is left out: it
        may contain parts of a request."""
        if self.in_a_row < IN_A_ROW:
            return None
        return (
            f"The last {self.in_a_row} steps of the engine failed, the last one with "
            f"{type(self.last).__name__}; the log says more."
        )


def client_errors(failed: Mapping[str, Exception]) -> dict[str, LorafxError]:
    """The errors of requests that clients get, by name. The errors that were raised are logged."""
    errors: dict[str, LorafxError] = {}
    causes: dict[int, Exception] = {}
    shared = Counter(map(id, failed.values()))
    for name, error in failed.items():
        if isinstance(error, LorafxError) and is_refusal(error):
            errors[name] = error
            continue
        causes[id(error)] = error
        together = " with others of its step" if shared[id(error)] > 1 else ""
        errors[name] = BatchError(
            f"this request failed{together}: the model, or how tokens are chosen, raised "
            f"{type(error).__name__}: {error}"
        )
    for error in causes.values():
        LOG.error("requests failed in a step of continuous batching", exc_info=error)
    return errors
