"""Tokens of a sequence that are guessed ahead, and verified in one step:

    sequence … t, draft d₁ … dₖ  →  the packed call, of k + 1 tokens  →  logits l₀ … lₖ
    l₀ → x₁;  while xᵢ = dᵢ:  lᵢ → xᵢ₊₁

Each x is chosen from its logits as in a step of its own: by processors, penalties, a grammar, the
number of the request's seed; and may end the sequence. So sequences are those without drafts, also
where they are drawn: x has the distribution p of the model, and d is kept if x = d. That is
speculative sampling by a draft that is certain of d: d is kept with the probability p(d), and what
stands in its place has the distribution p without d.

The keys and values of rejected tokens lie behind the sequence. With full attention its next step
writes there before it reads. In a window they have taken the places of tokens that are still seen,
so those are written back (`StepCache.snapshot`).
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypeAlias

import torch
from transformers.generation.configuration_utils import GenerationConfig
from transformers.generation.continuous_batching.cache_allocators import (
    SlidingAttentionCacheAllocator,
)
from transformers.generation.continuous_batching.input_outputs import ContinuousBatchingIOs
from transformers.generation.continuous_batching.requests import (
    FutureRequestState,
    RequestState,
    RequestStatus,
)
from transformers.generation.continuous_batching.utils import stream_context
from transformers.modeling_utils import PreTrainedModel

from lorafx.errors import ConfigError
from lorafx.generation.continuous.adapter_requests import AdapterRequest
from lorafx.generation.continuous.packed_call import NOT_FINITE, PackedForward
from lorafx.generation.continuous.parameters import checked_number, vocabulary_of
from lorafx.progress import LOG
from lorafx.runtime.forwards import CompiledForwards

#: Requests, and how many tokens of each are to be guessed at most.
Asked: TypeAlias = Sequence[tuple[AdapterRequest, int]]
#: How many tokens a draft model guesses if nobody says it.
_GUESSED = 5


class Proposer:
    """Where drafts come from."""

    def propose(self, asked: Asked, active: Mapping[str, RequestState]) -> Sequence[Sequence[int]]:
        """A draft for each of the requests `asked`, empty where nothing is likely. Called in each
        step; `active` has all requests that have begun, by name."""
        raise NotImplementedError

    def begin(self) -> None:
        """Begin without any request."""

    def warmup(self) -> None:
        """Compile what proposing needs."""

    def end(self) -> None:
        """Free what proposing needs, until `begin`."""


class Drafts:
    """The drafts of an engine's steps, of at most `count` tokens, within the positions of `models`.

    Attributes:
        proposed, accepted: how many tokens were verified, and after how many the sequence went on.
    """

    def __init__(self, proposer: Proposer, count: int, *models: Any) -> None:
        self.proposer = proposer
        self.proposed = self.accepted = 0
        self._count, self._failed = count, False
        configs = [model.config.get_text_config() for model in models]
        positions = [getattr(config, "max_position_embeddings", None) for config in configs]
        self._positions = min([2**31, *filter(None, positions)])
        ropes = [getattr(config, "rope_parameters", None) or {} for config in configs]
        #: Where longrope changes all rotations of a step, which follow its farthest token.
        self._changes = [
            rope["original_max_position_embeddings"]
            for rope in ropes
            if rope.get("rope_type") == "longrope"
        ]
        self._drafted: list[AdapterRequest] = []
        self._of_step: dict[str, list[int]] = {}

    def begin(self, processor: Any) -> None:
        """Draft for the steps of this processor."""
        allocators = processor.cache.cache_allocators.values()
        rings = [a for a in allocators if isinstance(a, SlidingAttentionCacheAllocator)]
        # Of more tokens than its window a step writes the last, so the first are not there to keep.
        self._count = min([self._count, *(ring.sliding_window - 1 for ring in rings)])

    def propose(
        self, states: Sequence[RequestState], budget: int, active: Mapping[str, RequestState]
    ) -> None:
        """Add drafts to the tokens that a step of `budget` tokens is to process: at most half of
        it, since prompts have to get on."""
        if self._failed:
            return
        decoding = [
            state
            for state in states
            if isinstance(state, AdapterRequest) and state.status == RequestStatus.DECODING
        ]
        room = min(self._count, budget // 2 // max(len(decoding), 1))
        asked = [(state, count) for state in decoding if (count := self._room(state, room)) > 0]
        try:
            drafts = self.proposer.propose(asked, active)
        except torch.AcceleratorError:
            raise  # the device is lost
        except Exception:
            LOG.exception("the draft failed; from now on this engine runs without one")
            self._failed = True
            return
        for (state, _), draft in zip(asked, drafts, strict=True):
            state.tokens_to_process = [*state.tokens_to_process, *draft]
        self._drafted = [state for state, _ in asked]

    def _room(self, state: AdapterRequest, most: int) -> int:
        """How many tokens may be guessed, where a step generates one more."""
        allowed = state._new_tokens_limit - len(state.generated_tokens)
        ahead = (position for position in self._changes if position > state.position_offset)
        end = min([self._positions, *ahead])
        return min(most, allowed - 1, end - state.position_offset - 1)

    def scheduled(self, batch: Sequence[FutureRequestState]) -> None:
        """Note the drafts that are in the step, and forget the others: a request that is begun
        again would take them for its own tokens."""
        found = {id(future.state) for future in batch}
        self._of_step = {}
        for state in self._drafted:
            if id(state) not in found:
                del state.tokens_to_process[1:]
            elif len(state.tokens_to_process) > 1:
                self._of_step[state.request_id] = state.tokens_to_process[1:]
        self._drafted = []

    def begin_step(self, step: ContinuousBatchingIOs) -> Mapping[str, Sequence[int]]:
        """The drafts of the step, by request, whose logits are then those before the draft."""
        names = [f.state.request_id for f in step.requests_in_batch if f.has_new_token]
        lengths = torch.tensor([len(self._of_step.get(name, ())) for name in names])
        step.logits_indices[: len(names)] -= lengths.to(step.logits_indices)
        return self._of_step

    def verify(
        self,
        batch: Sequence[FutureRequestState],
        processor: Any,
        packed: PackedForward,
        choose: Callable[[Any, Callable[[], None]], None],
    ) -> None:
        """Choose the further tokens of the step `batch`, whose first ones have been chosen."""
        step, depth = processor.inputs_and_outputs, 0
        alive = [f for f in step.requests_in_batch if f.state.request_id in self._of_step]
        ends = {future.state.request_id: future.state.position_offset for future in alive}
        self.proposed += sum(len(self._of_step[name]) for name in ends)
        for future in alive:
            future.state.position_offset -= future.query_length
        while True:
            for future in alive:  # of which one more token has come to stay
                future.complete_blocks = processor.cache.count_new_complete_blocks(future.state, 1)
                future.state.position_offset += 1
            processor.update_batch()
            alive = [future for future in alive if self._is_kept(future.state, depth)]
            step.requests_in_batch, step.num_request_in_batch = alive, len(alive)
            if not alive:
                break
            self.accepted += len(alive)
            choose(step, partial(self._choose_next, processor, packed, alive, depth))
            alive, depth = step.requests_in_batch, depth + 1
        rejected: list[bool] = []
        for future in batch:
            state, count = future.state, 0
            # The pages of a sequence that has ended may be another's by now.
            if state.request_id in ends and state.status == RequestStatus.DECODING:
                count = ends[state.request_id] - state.position_offset
            rejected += [False] * (future.query_length - count) + [True] * count
        undo, packed.undo = packed.undo, None
        if undo is not None:  # None if the whole step has failed
            with stream_context(step.compute_stream):
                undo(torch.tensor(rejected))

    def _is_kept(self, state: RequestState, depth: int) -> bool:
        draft = self._of_step[state.request_id][depth : depth + 1]
        return state.status == RequestStatus.DECODING and draft == state.generated_tokens[-1:]

    def _choose_next(
        self,
        processor: Any,
        packed: PackedForward,
        alive: Sequence[FutureRequestState],
        depth: int,
    ) -> None:
        """Choose what follows the draft's token `depth` of each of these requests."""
        step, runner = processor.inputs_and_outputs, processor.model_runner
        names = [future.state.request_id for future in alive]
        with stream_context(step.compute_stream):
            logits = torch.stack([packed.further[name][depth] for name in names]).float()
            for name, is_finite in zip(names, logits.amax(-1).isfinite().tolist(), strict=True):
                if not is_finite:
                    packed.failed[name] = FloatingPointError(NOT_FINITE)
            if runner.logit_processor.do_processing:
                ids = torch.tensor([self._of_step[name][depth] for name in names])
                # Processors with arguments by request are `Choosing`'s part.
                none = logits.new_empty(0, len(names))
                logits = runner.logit_processor(ids.to(logits.device), logits, none)
            runner._sample(logits[None], step.output_ids)
        step.retrieve_device_outputs()


class PromptLookup(Proposer):
    """Proposes what stood behind an earlier occurrence of a sequence's last tokens, as transformers
    does: of `longest` tokens, or else of fewer, and the first occurrence."""

    def __init__(self, longest: int) -> None:
        self._longest = longest

    def propose(self, asked: Asked, active: Mapping[str, RequestState]) -> Sequence[Sequence[int]]:
        """See Proposer."""
        return [
            looked_up(state.initial_tokens + state.generated_tokens, count, self._longest)
            for state, count in asked
        ]


def looked_up(tokens: Sequence[int], count: int, longest: int) -> Sequence[int]:
    """At most `count` tokens behind the first earlier occurrence of the last ones."""
    data = array("i", tokens)
    size, text = data.itemsize, data.tobytes()
    for length in range(min(longest, len(tokens) - 1), 0, -1):
        at, last = -1, text[-size * length :]
        while (at := text.find(last, at + 1, len(text) - size)) >= 0:
            if at % size == 0:
                behind = at // size + length
                return tokens[behind : behind + count]
    return ()


def checked_count(
    model: Any, draft: Any, guessed: int | None, looked_up: int | None, defaults: GenerationConfig
) -> int | None:
    """How many tokens are guessed by the model `draft`, or if that is None by looking them up; None
    for no drafts. Raises ConfigError if the number, or the draft, cannot be one."""
    if draft is None:
        if guessed is not None:
            raise ConfigError("num_assistant_tokens is of an assistant_model; give one, too")
        asked = defaults.prompt_lookup_num_tokens if looked_up is None else looked_up
        return None if asked is None else int(checked_number("prompt_lookup_num_tokens", asked))
    if looked_up is not None:
        raise ConfigError(
            "assistant_model and prompt_lookup_num_tokens are two ways to guess tokens; give one"
        )
    if not isinstance(draft, CompiledForwards | PreTrainedModel):
        raise ConfigError(
            "assistant_model is a model of transformers, or what lorafx.compile returned for one; "
            f"got {type(draft).__name__}"
        )
    drafting: Any = draft.model if isinstance(draft, CompiledForwards) else draft
    if not drafting.can_generate() or drafting.config.is_encoder_decoder:
        raise ConfigError(
            "assistant_model is a causal language model, which guesses the next tokens of a "
            f"sequence; got {type(drafting).__name__}"
        )
    theirs = vocabulary_of(drafting)
    if theirs != vocabulary_of(model):
        raise ConfigError(
            f"assistant_model has {theirs} tokens and the model {vocabulary_of(model)}: a draft "
            "guesses tokens of the model; give one with the same vocabulary"
        )
    asked = guessed if guessed is not None else defaults.num_assistant_tokens or _GUESSED
    return int(checked_number("num_assistant_tokens", asked))
