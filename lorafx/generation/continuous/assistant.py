"""Drafts by a smaller model of the same vocabulary, over a paged cache of its own.

    tokens that the cache of the draft lacks, of all requests  →  one packed call  →  d₁ of each
    d₁ of each request                                         →  one packed call  →  d₂ of each …

The likeliest tokens are taken. What is verified is right in any case, so the cache may be wrong:
where a window has lost tokens to rejected ones, and where an adapter of the draft was replaced.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from transformers.generation.continuous_batching import ContinuousBatchingManager
from transformers.generation.continuous_batching.requests import FutureRequestState, RequestState

from lorafx.adapter_store.names import BASE
from lorafx.generation.continuous.adapter_requests import AdapterRequest, hold_of
from lorafx.generation.continuous.drafts import Asked, Proposer
from lorafx.runtime.session import Session


class Assistant(Proposer):
    """Proposes what a draft model would generate. A request uses the draft's adapter of the name of
    its own, if there is one when its draft begins, and else the draft's default.

    Args:
        engine: one of the draft that is not started; its parts run here, in another's thread.
        forward: what `engine` calls for the draft.
        session: the draft's; None if it is not compiled, and has no adapters.
    """

    def __init__(
        self, engine: ContinuousBatchingManager, forward: Any, session: Session | None
    ) -> None:
        self._engine, self._forward, self._session = engine, forward, session
        self._drafting: dict[str, tuple[RequestState, AdapterRequest]] = {}

    def begin(self) -> None:
        """See Proposer."""
        self._engine.batch_processor = self._engine._create_batch_processor()
        self._drafting.clear()

    def warmup(self) -> None:
        """See Proposer."""
        self._engine.warmup()

    def end(self) -> None:
        """Free the cache, and give the draft its attention back."""
        engine: Any = self._engine
        engine.destroy()
        engine.batch_processor = None
        self._drafting.clear()
        if engine._original_attn_impl is not None:  # transformers does so for engines that ran
            engine.model.set_attn_implementation(engine._original_attn_impl)
            engine._original_attn_impl = None

    def propose(self, asked: Asked, active: Mapping[str, RequestState]) -> Sequence[Sequence[int]]:
        """At most so many tokens for each of these requests; none while the draft has not seen all
        of a long prompt, or has no slot or no page for the request."""
        processor: Any = self._engine.batch_processor
        cache = processor.cache
        for name, (state, draft) in [*self._drafting.items()]:
            if active.get(name) is state:  # what was rejected is written anew
                draft.position_offset = min(draft.position_offset, state.position_offset)
            else:
                cache.free_blocks(name)
                del self._drafting[name]
        drafts: dict[str, list[int]] = {state.request_id: [] for state, _ in asked}
        counts, room = {state.request_id: count for state, count in asked}, cache.max_batch_tokens
        names: set[str] = set()
        batch: list[FutureRequestState] = []
        for state, count in asked[: processor.cb_config.max_requests_per_batch]:
            draft = self._draft_of(state)
            hold = hold_of(draft)
            using = names if hold is None else names | {hold.name}
            missing = _tokens_from(state, draft.position_offset)
            tokens = missing[:room]
            session, more = self._session, len(tokens) + count - 1
            has_slot = session is None or session.store.fits(frozenset(using))
            if not (tokens and has_slot and cache.can_store_request_tokens(draft, more)):
                continue
            names, room = using, room - len(tokens)
            draft.tokens_to_process = tokens
            batch.append(FutureRequestState(draft, len(tokens) == len(missing), {}, len(tokens)))
        while batch:
            chosen = self._chosen(batch)
            batch = []
            for draft, token in chosen:
                tokens = drafts[draft.request_id]
                tokens.append(token)
                if len(tokens) < counts[draft.request_id]:
                    draft.tokens_to_process = [token]
                    batch.append(FutureRequestState(draft, True, {}, 1))
        return [*drafts.values()]

    def _draft_of(self, state: AdapterRequest) -> AdapterRequest:
        """What generates the draft of a request: another of the same name."""
        if state.request_id not in self._drafting:
            theirs, session, hold = hold_of(state), self._session, None
            if session is not None:
                name = None if theirs is None else theirs.stored.name  # also of a former version
                name = name if name in session.store else session.default
                hold = None if name is None or name == BASE else session.store.hold(name)
            draft = AdapterRequest(state.request_id, initial_tokens=[], hold=hold)
            self._drafting[state.request_id] = state, draft
        return self._drafting[state.request_id][1]

    def _chosen(self, batch: Sequence[FutureRequestState]) -> list[tuple[AdapterRequest, int]]:
        """The draft's next token of each request of `batch` that has one."""
        processor: Any = self._engine.batch_processor
        step = processor.inputs_and_outputs
        step.prepare_batch_tensors(
            batch,
            processor.logit_processor,
            use_decode_fast_path=False,
            num_q_tokens=sum(future.query_length for future in batch),
            max_kv_read=sum(future.state.position_offset for future in batch),
            use_padding=False,
        )
        processor._generation_step(self._forward)
        drafts: list[Any] = [future.state for future in batch if future.has_new_token]
        return [*zip(drafts, step.output_ids[0, : len(drafts)].tolist(), strict=True)]


def _tokens_from(state: RequestState, start: int) -> list[int]:
    """The tokens of a sequence from `start` on."""
    behind = max(start - len(state.initial_tokens), 0)
    return state.initial_tokens[start:] + state.generated_tokens[behind:]
