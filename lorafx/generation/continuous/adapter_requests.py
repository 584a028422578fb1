"""Requests of the engine, each with its adapter, and what the engine hands back of them. Forks, and
what becomes of a request that is put off, keep the adapter in its version."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any

from transformers.generation.continuous_batching.continuous_api import OutputRouter
from transformers.generation.continuous_batching.requests import GenerationOutput, RequestState

from lorafx.adapter_store.stored import Hold


@dataclass
class AdapterRequest(RequestState):
    """A request of the engine, with its adapter (`hold`, None for the base), which is active from
    the token `begins` on (aLoRA), and a number for the base `weights` that it began with."""

    hold: Hold | None = None
    weights: int = 0
    begins: int = 0

    @property
    def salt(self) -> int:
        """What its keys and values depend on besides its tokens, from the token `begins` on, in
        128 bits; 0 is the base, as it was first."""
        return (0 if self.hold is None else self.hold.stored.version) << 64 | self.weights

    def inactive(self, count: int) -> int:
        """How many of the last `count` tokens its adapter leaves to the base."""
        return min(max(self.begins - (self.position_offset - count), 0), count)

    def fork(self, new_request_id: str) -> RequestState:
        """A further sequence, which shares the hold: the rest is copied deeply."""
        hold, self.hold = self.hold, None
        try:
            forked: Any = super().fork(new_request_id)
        finally:
            self.hold = hold
        forked.hold = hold
        return forked

    def create_equivalent_initial_request(self) -> RequestState:
        """The request from its start, with the tokens that it has generated in the prompt."""
        again = super().create_equivalent_initial_request()
        given = {f.name: getattr(again, f.name) for f in fields(RequestState) if f.init}
        return AdapterRequest(**given, hold=self.hold, begins=self.begins)


def hold_of(state: RequestState) -> Hold | None:
    """The adapter of a request; None is the base model, also for requests that the engine makes to
    warm up."""
    return state.hold if isinstance(state, AdapterRequest) else None


def further(name: str, count: int) -> list[str]:
    """The names of `count` further sequences of a request."""
    return [f"{name}__child#{i}" for i in range(count)]


class EngineOutputs(OutputRouter):
    """transformers' router, with the names of the requests under way. Where a request fails before
    its further sequences have begun, they fail with it."""

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

    def _end(self, names: Iterable[str]) -> None:
        with self._names_lock:
            self._names.difference_update(names)

    def gone(self, state: RequestState) -> None:
        """A request was cancelled: nothing of it is handed back."""
        self._end([state.request_id, *further(state.request_id, state.num_children)])

    def deliver(self, output: GenerationOutput) -> None:
        if output.is_finished():
            self._end([output.request_id])
        super().deliver(output)

    def deliver_batch(self, outputs: list[GenerationOutput]) -> None:
        self._end(output.request_id for output in outputs if output.is_finished())
        super().deliver_batch(outputs)

    def fail_and_deliver(self, state: RequestState, error: Exception) -> None:
        super().fail_and_deliver(state, error)
        names, state.num_children = further(state.request_id, state.num_children), 0
        for name in names:
            self.deliver(dataclasses.replace(state.to_generation_output(), request_id=name))
