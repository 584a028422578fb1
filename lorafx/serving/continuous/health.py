"""Whether the steps of an engine succeed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from transformers.generation.continuous_batching.requests import FutureRequestState

from lorafx.errors import CaptureError, LorafxError, LoweringError, VerifyError
from lorafx.serving.continuous.requests import ticket_of

#: An engine whose last so many steps have failed is not healthy.
IN_A_ROW = 5


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

    @property
    def failing(self) -> bool:
        """Whether as many steps in a row have failed that the next ones are expected to."""
        return self.in_a_row >= IN_A_ROW

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
            if of_the_model or not isinstance(error, LorafxError):
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
