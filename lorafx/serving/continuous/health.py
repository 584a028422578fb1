"""Whether the steps of an engine succeed, and what requests are told where they do not."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from transformers.generation.continuous_batching.requests import FutureRequestState

from lorafx.errors import BatchError, CaptureError, LorafxError, LoweringError, VerifyError
from lorafx.progress import LOG
from lorafx.serving.continuous.adapter_requests import ticket_of
from lorafx.serving.continuous.isolate_failures import is_refusal

if TYPE_CHECKING:
    from lorafx.serving.compiled import CompiledModel

#: An engine whose last so many steps have failed is not healthy.
IN_A_ROW = 5
#: Of its steps one in so many is run in parts, if it fails too.
SEARCHED = 4


class StepHealth:
    """What has become of the steps of an engine. A step fails where none of its requests is served
    and the model, not what they ask for, is why.

    Attributes:
        failed: steps that have failed since the engine was made.
        in_a_row: those among them after which none has succeeded.
        last: with which the last of them failed.
    """

    def __init__(self) -> None:
        self.failed = 0
        self.in_a_row = 0
        self.last: Exception | None = None
        self._passed_over = 0

    @property
    def failing(self) -> bool:
        """Whether as many steps in a row have failed that the next ones are expected to."""
        return self.in_a_row >= IN_A_ROW

    def searches(self) -> bool:
        """Whether the next step is run in parts if it fails; asked once for each step. That takes
        several tries, which are in vain where the model fails for everybody. But where somebody
        sends one bad request after the other, it serves those beside them, and ends the row."""
        self._passed_over = (self._passed_over + 1) % SEARCHED if self.failing else 0
        return self._passed_over == 0

    def succeeded(self) -> None:
        """A step has served at least one request."""
        self.in_a_row, self.last = 0, None

    def nobody_served(
        self, batch: Iterable[FutureRequestState], failed: Mapping[str, Exception]
    ) -> None:
        """All requests of a step have failed, with these errors by their names."""
        for future in batch:
            error, ticket = failed[future.state.request_id], ticket_of(future.state)
            if isinstance(error, FloatingPointError) and ticket is not None and ticket.hold:
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
        last = self.last
        if not self.failing or last is None:
            return None
        return (
            f"The last {self.in_a_row} steps of the engine failed, the last one with "
            f"{type(last).__name__}; the log says more."
        )


def left(process: int | None, compiled: CompiledModel) -> str | None:
    """Why an engine that runs in `process` serves nobody here any more; None where it may."""
    if process not in (None, os.getpid()):
        return (
            "The engine's thread runs in the process that this one was forked from; start an "
            "engine here, by continuous_batching()"
        )
    try:
        compiled._check_attached()
    except CaptureError as error:
        return str(error)
    return None


def as_told(failed: Mapping[str, Exception]) -> dict[str, LorafxError]:
    """What requests that failed are told, by their names; the log has what was raised."""
    said: dict[str, LorafxError] = {}
    causes: dict[int, Exception] = {}
    shared = Counter(map(id, failed.values()))
    for name, error in failed.items():
        if isinstance(error, LorafxError) and is_refusal(error):
            said[name] = error
            continue
        causes[id(error)] = error
        several = shared[id(error)] > 1
        said[name] = BatchError(
            f"this request failed{' with others of its step' if several else ''}: the model, or "
            f"how tokens are chosen, raised {type(error).__name__}: {error}"
        )
    for error in causes.values():
        LOG.error("requests failed in a step of continuous batching", exc_info=error)
    return said
