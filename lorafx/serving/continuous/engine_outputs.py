"""What the engine hands back, and the names of the requests that it has not handed back yet."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Sequence

from transformers.generation.continuous_batching.continuous_api import OutputRouter
from transformers.generation.continuous_batching.requests import GenerationOutput, RequestState


def further(name: str, count: int) -> list[str]:
    """The names of `count` further sequences of a request."""
    return [f"{name}__child#{i}" for i in range(count)]


class EngineOutputs(OutputRouter):
    """transformers' router. Where a request fails before its further sequences have begun, they
    fail with it."""

    def __init__(self) -> None:
        super().__init__()
        self._names: set[str] = set()
        self._names_lock = threading.Lock()

    def begin(self, name: str, count: int) -> bool:
        """Note a request with `count` further sequences; False where one of the names is that of a
        request under way."""
        names = {name, *further(name, count)}
        with self._names_lock:
            if names & self._names:
                return False
            self._names |= names
            return True

    def end(self, names: Sequence[str]) -> None:
        """These names are free again."""
        with self._names_lock:
            self._names.difference_update(names)

    def gone(self, state: RequestState) -> None:
        """A request was cancelled: nothing of it is handed back."""
        self.end([state.request_id, *further(state.request_id, state.num_children)])

    def deliver(self, output: GenerationOutput) -> None:
        """Hand back one output."""
        if output.is_finished():
            self.end([output.request_id])
        super().deliver(output)

    def deliver_batch(self, outputs: list[GenerationOutput]) -> None:
        """Hand back those of one step."""
        self.end([output.request_id for output in outputs if output.is_finished()])
        super().deliver_batch(outputs)

    def fail_and_deliver(self, state: RequestState, error: Exception) -> None:
        """Have a request, and what was to come of it, fail with `error`."""
        super().fail_and_deliver(state, error)
        names, state.num_children = further(state.request_id, state.num_children), 0
        for name in names:
            self.deliver(dataclasses.replace(state.to_generation_output(), request_id=name))
