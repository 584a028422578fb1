"""Requests of the engine, each with its adapter, the blocks of the cache that they share, and what
the engine hands back of them. Forks, and what becomes of a request that is put off, keep the
adapter in its version.

transformers finds blocks again by a hash of their tokens and of those before them. Here the first
tokens of a sequence are hashed together with the versions of its adapter and of the base weights,
on which keys and values depend. Of an aLoRA adapter these are the tokens that end with the first of
its invocation: it shares the blocks before them with the base.
"""

from __future__ import annotations

import dataclasses
import hashlib
import threading
from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from types import SimpleNamespace
from typing import Any

from transformers.generation.continuous_batching import PagedAttentionCache
from transformers.generation.continuous_batching.continuous_api import OutputRouter
from transformers.generation.continuous_batching.requests import GenerationOutput, RequestState

from lorafx.adapter_store.stored import Hold
from lorafx.runtime.session import Session

#: Tokens that carry the salt: as many 32-bit numbers as a digest has, at most.
_SALTED = hashlib.blake2b.MAX_DIGEST_SIZE // 4


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


class AdapterPages(PagedAttentionCache):
    """A cache of the engine's whose blocks are shared among requests of one adapter version.

    Attributes:
        waiting: the request that waits under this name, or None.
        session: of the model that is served.
    """

    waiting: Callable[[str], RequestState | None]
    session: Session

    def search_prefix_match(self, request_id: str, prompt_ids: list[int]) -> int:
        """How many of the prompt's tokens are in the cache, written by the same adapter."""
        state, base = self.waiting(request_id), self.session.base
        if isinstance(state, AdapterRequest):
            # Blocks that it fills after new weights were loaded are not for those that come then.
            state.weights = 2 * self.session.counts.writes + (base.merged is not None)
        return int(super().search_prefix_match(request_id, self._salted(state, prompt_ids)))

    def mark_complete_blocks(self, state: RequestState, complete_blocks: dict[str, int]) -> None:
        """Let others find the blocks that the request's last step completed."""
        if not complete_blocks:  # as after most steps: the tokens of all its steps are not needed
            return
        seen: Any = SimpleNamespace(
            request_id=state.request_id,
            status=state.status,
            initial_tokens=self._salted(state, state.initial_tokens + state.generated_tokens),
            generated_tokens=[],
        )
        super().mark_complete_blocks(seen, complete_blocks)

    def _salted(self, state: RequestState | None, tokens: list[int]) -> list[int]:
        if not isinstance(state, AdapterRequest):
            return list(tokens)
        count = min(_SALTED, *(a.tokens_per_page for a in self.cache_allocators.values()))
        if not state.begins:
            return _with_salt(tokens, state.salt, count)
        # No block with the token at which the adapter begins lacks these, or what goes before it.
        first = max(state.begins - count + 1, 0)
        return _with_salt(_with_salt(tokens, state.weights, count), state.salt, count, first)


def _with_salt(tokens: Sequence[int], salt: int, count: int, first: int = 0) -> list[int]:
    """`tokens` with `count` of them, from `first` on, replaced by a digest of those and `salt`; as
    they are where the salt is 0, and where there are fewer, which fill no block."""
    end = first + count
    if not salt or len(tokens) < end:
        return list(tokens)
    replaced = array("i", tokens[first:end]).tobytes()
    digest = hashlib.blake2b(replaced, digest_size=4 * count, salt=salt.to_bytes(16, "little"))
    return [*tokens[:first], *array("i", digest.digest()), *tokens[end:]]
