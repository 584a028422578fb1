"""Requests of the engine, each with its adapter; the blocks of the cache that they share; and their
outputs. Forks of a request, and the request that replaces an offloaded one, keep the version of
its adapter.

transformers finds cached blocks by a hash of their tokens and of those before them. Keys and values
also depend on the versions of the adapter and of the base weights, so the first tokens of a
sequence are replaced by a digest of themselves and these versions. For an aLoRA adapter the digest
ends at the first token of the invocation, so that blocks before it are shared with the base.
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

#: The largest number of tokens that are replaced by a digest, as its 32-bit integers.
_SALTED = hashlib.blake2b.MAX_DIGEST_SIZE // 4


@dataclass
class AdapterRequest(RequestState):
    """A request of the engine. `hold` is its adapter, None for the base; it is active from the
    token `begins` on (aLoRA). `weights` is the version of the base weights that it began with."""

    hold: Hold | None = None
    weights: int = 0
    begins: int = 0

    @property
    def salt(self) -> int:
        """The versions of adapter and base weights in 128 bits, on which keys and values depend
        from the token `begins` on; 0 for the base with its first weights."""
        return (0 if self.hold is None else self.hold.stored.version) << 64 | self.weights

    def inactive(self, count: int) -> int:
        """How many of the last `count` tokens are before the adapter begins."""
        return min(max(self.begins - (self.position_offset - count), 0), count)

    def fork(self, new_request_id: str) -> RequestState:
        """Another sequence of the request, which shares the hold and copies everything else."""
        hold, self.hold = self.hold, None
        try:
            forked: Any = super().fork(new_request_id)
        finally:
            self.hold = hold
        forked.hold = hold
        return forked

    def create_equivalent_initial_request(self) -> RequestState:
        """The request from its start, with the tokens that it has generated in the prompt."""
        state = super().create_equivalent_initial_request()
        values = {f.name: getattr(state, f.name) for f in fields(RequestState) if f.init}
        return AdapterRequest(**values, hold=self.hold, begins=self.begins)


def hold_of(state: RequestState) -> Hold | None:
    """The adapter of a request; None for the base model, and for the engine's own requests while it
    warms up."""
    return state.hold if isinstance(state, AdapterRequest) else None


def fork_names(name: str, count: int) -> list[str]:
    """The names that transformers gives `count` forks of a request."""
    return [f"{name}__child#{i}" for i in range(count)]


class EngineOutputs(OutputRouter):
    """transformers' router, which also keeps the names of running requests. If a request fails
    before it is forked, its forks fail with it."""

    def __init__(self) -> None:
        super().__init__()
        self._names: set[str] = set()
        self._names_lock = threading.Lock()

    def begin(self, name: str, count: int) -> bool:
        """Add a request that will have `count` forks. Returns False, and adds nothing, if one of
        the names is that of a running request."""
        names = {name, *fork_names(name, count)}
        with self._names_lock:
            if names & self._names:
                return False
            self._names |= names
            return True

    def _remove(self, names: Iterable[str]) -> None:
        with self._names_lock:
            self._names.difference_update(names)

    def cancelled(self, state: RequestState) -> None:
        """Remove a request that was cancelled, which has no output."""
        self._remove([state.request_id, *fork_names(state.request_id, state.num_children)])

    def deliver(self, output: GenerationOutput) -> None:
        if output.is_finished():
            self._remove([output.request_id])
        super().deliver(output)

    def deliver_batch(self, outputs: list[GenerationOutput]) -> None:
        self._remove(output.request_id for output in outputs if output.is_finished())
        super().deliver_batch(outputs)

    def fail_and_deliver(self, state: RequestState, error: Exception) -> None:
        super().fail_and_deliver(state, error)
        names, state.num_children = fork_names(state.request_id, state.num_children), 0
        for name in names:
            self.deliver(dataclasses.replace(state.to_generation_output(), request_id=name))


class AdapterPages(PagedAttentionCache):
    """A cache of the engine whose blocks are shared among requests of one adapter version.

    Attributes:
        waiting: returns the waiting request of a name, or None.
        session: the session of the served model.
    """

    waiting: Callable[[str], RequestState | None]
    session: Session

    def search_prefix_match(self, request_id: str, prompt_ids: list[int]) -> int:
        """How many of the prompt's tokens are in the cache, computed by the same adapter."""
        state, base = self.waiting(request_id), self.session.base
        if isinstance(state, AdapterRequest):
            # New weights change this number, so later requests do not find the blocks of this one.
            state.weights = 2 * self.session.counts.writes + (base.merged is not None)
        return int(super().search_prefix_match(request_id, self._salted(state, prompt_ids)))

    def mark_complete_blocks(self, state: RequestState, complete_blocks: dict[str, int]) -> None:
        """Let other requests find the blocks that the last step of this one completed."""
        if not complete_blocks:  # the usual case, in which no list of tokens is built
            return
        salted: Any = SimpleNamespace(
            request_id=state.request_id,
            status=state.status,
            initial_tokens=self._salted(state, state.initial_tokens + state.generated_tokens),
            generated_tokens=[],
        )
        super().mark_complete_blocks(salted, complete_blocks)

    def _salted(self, state: RequestState | None, tokens: list[int]) -> list[int]:
        if not isinstance(state, AdapterRequest):
            return list(tokens)
        count = min(_SALTED, *(a.tokens_per_page for a in self.cache_allocators.values()))
        if not state.begins:
            return _with_salt(tokens, state.salt, count)
        # The hash of a block with the token `begins`, or a later one, contains all these tokens.
        first = max(state.begins - count + 1, 0)
        return _with_salt(_with_salt(tokens, state.weights, count), state.salt, count, first)


def _with_salt(tokens: Sequence[int], salt: int, count: int, first: int = 0) -> list[int]:
    """`tokens`, of which `count` from `first` on are replaced by a digest of them and of `salt`;
    unchanged if the salt is 0, or if there are fewer tokens, which fill no block."""
    end = first + count
    if not salt or len(tokens) < end:
        return list(tokens)
    replaced = array("i", tokens[first:end]).tobytes()
    digest = hashlib.blake2b(replaced, digest_size=4 * count, salt=salt.to_bytes(16, "little"))
    return [*tokens[:first], *array("i", digest.digest()), *tokens[end:]]
