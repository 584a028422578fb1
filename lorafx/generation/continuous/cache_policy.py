"""Which blocks of the engine's cache requests share, and who fails where it is full.

transformers finds blocks again by a hash of their tokens and of those before them. Here the first
tokens of a sequence are hashed together with the versions of its adapter and of the base weights,
on which keys and values depend. Of an aLoRA adapter these are the tokens that end with the first of
its invocation: it shares the blocks before them with the base.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

from transformers.generation.continuous_batching import PagedAttentionCache
from transformers.generation.continuous_batching.offloading_manager import OffloadingManager
from transformers.generation.continuous_batching.requests import RequestState, RequestStatus

from lorafx.errors import CapacityError
from lorafx.generation.continuous.adapter_requests import AdapterRequest
from lorafx.runtime.session import Session

#: Tokens that carry the salt: as many 32-bit numbers as a digest has, at most.
_SALTED = hashlib.blake2b.MAX_DIGEST_SIZE // 4


class FullCache(OffloadingManager):
    """transformers' manager takes cached blocks and other requests out of the cache, which begin
    again later, and ends where nothing is left to take out. Here the one request fails that the
    cache cannot hold."""

    fail: Callable[[RequestState, CapacityError], None]

    def offload_requests(self) -> bool:
        """Make room for the next step; whether there is a reason to try again."""
        if super().offload_requests():
            return True
        scheduler: Any = self.scheduler
        if not scheduler.stuck:
            return False
        waiting = [s for s in scheduler.stuck if s.status == RequestStatus.PENDING]
        starved = [state for state, _ in scheduler.starved_requests]
        state = [*starved[-1:], *waiting, *scheduler.stuck][0]
        tokens = len(state.initial_tokens) + len(state.generated_tokens)
        self.fail(
            state,
            CapacityError(
                f"request {state.request_id!r}, at {tokens} tokens, does not fit into the cache; "
                "give a larger ContinuousBatchingConfig(num_blocks=...), or ask for fewer tokens"
            ),
        )
        return True


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
