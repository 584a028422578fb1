"""The engine's cache, whose blocks are shared only among requests of one adapter version.

transformers finds blocks with the same tokens again by a hash of the tokens. Keys and values also
depend on the adapter that computed them, and on the base weights. So the first tokens of a sequence
are hashed together with the versions of both, in place of themselves; each block's hash goes on
from the one before it.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

from transformers.generation.continuous_batching import PagedAttentionCache
from transformers.generation.continuous_batching.requests import RequestState

from lorafx.serving.continuous.requests import AdapterRequest
from lorafx.session.session import Session

#: Tokens that carry the salt: as many 32-bit numbers as a digest has, at most.
_SALTED = hashlib.blake2b.MAX_DIGEST_SIZE // 4


class AdapterPages(PagedAttentionCache):
    """A cache of the engine's that knows whose request it is asked about.

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
            state.weights = 2 * self.session.writes + (base.merged is not None)
        return int(super().search_prefix_match(request_id, self._salted(state, prompt_ids)))

    def mark_complete_blocks(self, state: RequestState, complete_blocks: dict[str, int]) -> None:
        """Let others find the blocks that the request's last step completed."""
        seen: Any = SimpleNamespace(
            request_id=state.request_id,
            status=state.status,
            initial_tokens=self._salted(state, state.initial_tokens + state.generated_tokens),
            generated_tokens=[],
        )
        super().mark_complete_blocks(seen, complete_blocks)

    def _salted(self, state: RequestState | None, tokens: list[int]) -> list[int]:
        salt = state.salt if isinstance(state, AdapterRequest) else 0
        page = min(a.tokens_per_page for a in self.cache_allocators.values())
        return salted(tokens, salt, min(page, _SALTED))


def salted(tokens: Sequence[int], salt: int, count: int) -> list[int]:
    """`tokens` with the first `count` of them replaced by a digest of those and `salt`; as they are
    where the salt is 0, and where there are fewer, which fill no block."""
    if not salt or len(tokens) < count:
        return list(tokens)
    first = array("i", tokens[:count]).tobytes()
    digest = hashlib.blake2b(first, digest_size=4 * count, salt=salt.to_bytes(16, "little"))
    return [*array("i", digest.digest()), *tokens[count:]]
