"""Requests of the engine, each with its adapter; the blocks of the cache that they share; and their
outputs. Forks of a request, and the request that replaces an offloaded one, keep the version of
its adapter.

transformers finds cached blocks by a hash of their tokens and of those before them. Keys and values
also depend on the versions of the adapter and of the base weights, so the first tokens of a
sequence are replaced by a digest of themselves and these versions. For an aLoRA adapter the digest
ends at the first token of the invocation, so that blocks before it are shared with the base.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import random
import threading
from array import array
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields
from types import SimpleNamespace
from typing import Any, Literal, NamedTuple

from transformers.generation.continuous_batching import PagedAttentionCache
from transformers.generation.continuous_batching.continuous_api import OutputRouter
from transformers.generation.continuous_batching.requests import (
    GenerationOutput,
    RequestState,
    RequestStatus,
)

from lorafx.adapter_store.names import BASE, SUMS, Mixture
from lorafx.adapter_store.stored import Hold
from lorafx.errors import LorafxError
from lorafx.generation.continuous.parameters import Grammar, Sampling, TokenParameters
from lorafx.runtime.session import Session

#: The largest number of tokens that are replaced by a digest, as its 32-bit integers.
_SALTED = hashlib.blake2b.MAX_DIGEST_SIZE // 4


class TokenLogprobs(NamedTuple):
    """The log-probability of a token by the logits that the model gave, before penalties and
    temperature; its rank among all tokens, from 1; and the likeliest tokens with theirs, in
    descending order, as many as the request asks for."""

    token: int
    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...]

    def __deepcopy__(self, memo: object) -> TokenLogprobs:
        """Sequences of one request share these values."""
        return self


@dataclass
class SequenceOutput(GenerationOutput):
    """The output of one sequence of a request. Like `generated_tokens`, those of a stream have all
    that there is so far.

    Attributes:
        logprobs: those of the generated tokens as they were chosen, after penalties, temperature,
            top_k, top_p and min_p, if the request asks for `return_logprobs`.
        token_logprobs: those by the model's logits, if it asks for that or for `logprobs`.
        prompt_logprobs: those of the prompt's tokens, if it asks for `prompt_logprobs`. The first
            token has none.
        finish_reason: "length" if as many tokens were generated as the request allows; "stop" if
            the sequence ended by itself; "abort" if `AdapterBatchingManager.drain` ended it; None
            if it has not ended, or failed.
        stop_reason: the string of `stop`, or the token of `stop_token_ids`, that ended it.
        adapter_version: that of its adapter, as in `CompiledModel.adapter_versions`; None for the
            base.
        weights_version: how often the base weights had been updated when it began.
        refused: whether it failed by what it asked for, such as a grammar that leaves no token.
    """

    token_logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs | None] = field(default_factory=list)
    finish_reason: Literal["stop", "length", "abort"] | None = None
    stop_reason: int | str | None = None
    adapter_version: int | None = None
    weights_version: int = 0
    refused: bool = False


@dataclass
class AdapterRequest(RequestState):
    """A sequence of a request of the engine.

    Attributes:
        hold: its adapter, None for the base; active from the token `begins` on (aLoRA).
        weights: the version of the base weights that it began with.
        family: the names of all sequences of its request, of which its own is one.
        sampling: how its tokens are drawn; None if they are the likeliest ones.
        parameters: what else it asks of its tokens; None for nothing.
        grammar: which tokens it may have.
        token_logprobs, prompt_logprobs: as in `SequenceOutput`.
        newest, chosen_logprob: the log-probability of the token that this step has chosen, by the
            model's logits and as it was chosen.
        ends: whether it ends with that token, for the reason `stop_reason`.
        refused: as in `SequenceOutput`.
    """

    hold: Hold | None = None
    weights: int = 0
    begins: int = 0
    family: Sequence[str] = ()
    sampling: Sampling | None = None
    parameters: TokenParameters | None = None
    grammar: Grammar | None = None
    token_logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs | None] = field(default_factory=list)
    newest: TokenLogprobs | None = None
    chosen_logprob: float | None = None
    ends: bool = False
    stop_reason: int | str | None = None
    refused: bool = False
    _counts: dict[int, int] | None = None

    @property
    def salt(self) -> int:
        """The versions of adapter and base weights in 128 bits, on which keys and values depend
        from the token `begins` on; 0 for the base with its first weights."""
        return (0 if self.hold is None else self.hold.stored.version) << 64 | self.weights

    @property
    def prompt_length(self) -> int:
        """The number of tokens of the prompt that was added."""
        return self._true_initial_tokens or len(self.initial_tokens)

    @property
    def generated(self) -> list[int]:
        """All tokens that it has generated, also those before it was offloaded."""
        earlier = self.initial_tokens[self.prompt_length :]
        return earlier + self.generated_tokens if earlier else self.generated_tokens

    @property
    def scoring(self) -> bool:
        """Whether log-probabilities of its prompt are asked for and not known yet."""
        return 0 < len(self.prompt_logprobs) < self.prompt_length

    def inactive(self, count: int) -> int:
        """How many of the last `count` tokens are before the adapter begins."""
        return min(max(self.begins - (self.position_offset - count), 0), count)

    def unscored(self, count: int) -> range:
        """Which of the last `count` tokens are followed by a token of the prompt whose
        log-probability is not known yet."""
        first = self.position_offset - count
        known = len(self.prompt_logprobs)
        return range(max(known - 1 - first, 0), min(self.prompt_length - 1 - first, count))

    def counts(self) -> dict[int, int]:
        """How often it has generated each token of the prompt, and each that it has generated."""
        if self._counts is None:
            self._counts = dict.fromkeys(self.initial_tokens[: self.prompt_length], 0)
            self._count(self.generated)
        return self._counts

    def _count(self, tokens: Iterable[int]) -> None:
        if self._counts is not None:
            for token in tokens:
                self._counts[token] = self._counts.get(token, 0) + 1

    def draw(self, seed: int) -> float:
        """The number from 0 to 1 by which its next token is drawn. It depends on nothing but the
        seed, the sequence and the number of tokens, so it is the same after a restart."""
        sequence = self.family.index(self.request_id)
        return random.Random(f"{seed + sequence} {len(self.generated)}").random()

    def update_and_check_completion(self, token_id: int, logprob: float | None) -> bool:
        """Add a token. Returns whether the sequence has ended."""
        if not self._new_tokens_limit:  # transformers warns of the token
            self.status = RequestStatus.FINISHED
            return True
        ended = super().update_and_check_completion(token_id, self.chosen_logprob)
        self._count((token_id,))
        if self.newest is not None:
            self.token_logprobs.append(self.newest)
        self.ends = self.ends or token_id in self._eos_token_ids
        if self.ends and not ended:
            self.status = RequestStatus.FINISHED
        return self.ends or ended

    def to_generation_output(self) -> SequenceOutput:
        """What the sequence has now."""
        finished = self.status == RequestStatus.FINISHED
        return SequenceOutput(
            **vars(super().to_generation_output()),
            token_logprobs=self.token_logprobs[:],
            prompt_logprobs=self.prompt_logprobs,
            finish_reason=("stop" if self.ends else "length") if finished else None,
            stop_reason=self.stop_reason if finished else None,
            adapter_version=None if self.hold is None else self.hold.stored.version,
            weights_version=self.weights >> 1,
            refused=self.refused,
        )

    def create_equivalent_initial_request(self) -> AdapterRequest:
        """The request from its start, with the tokens that it has generated in the prompt."""
        state = super().create_equivalent_initial_request()
        values = {f.name: getattr(state, f.name) for f in fields(RequestState) if f.init}
        own = {name: copy.deepcopy(getattr(self, name)) for name in _OWN}
        return AdapterRequest(**values, **own)

    def apart(self) -> list[AdapterRequest]:
        """The sequences of a request that has not begun as requests of their own. transformers
        forks a request in a step before that of the last token, so one token is too short."""
        self.num_children = 0
        others = [self.create_equivalent_initial_request() for _ in self.family[1:]]
        for name, other in zip(self.family[1:], others, strict=True):
            other.request_id = name
        return [self, *others]


#: The fields of a request that transformers' do not have.
_OWN = [f.name for f in fields(AdapterRequest)[len(fields(RequestState)) :]]


def weights_now(session: Session) -> int:
    """The version of the base weights: twice the number of updates, and 1 if an adapter is
    merged."""
    return 2 * session.counts.writes + (session.base.merged is not None)


def hold_of(state: RequestState) -> Hold | None:
    """The adapter of a request; None for the base model, and for the engine's own requests while it
    warms up."""
    return state.hold if isinstance(state, AdapterRequest) else None


def account_of(state: RequestState) -> str:
    """The name under which a request's tokens are counted; that of all versions of its adapter."""
    hold = hold_of(state)
    name = BASE if hold is None else hold.stored.name
    return SUMS if isinstance(name, Mixture) else name


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
        #: Those of `names` that end with an output when they are cancelled.
        self.aborted: set[str] = set()

    @property
    def names(self) -> set[str]:
        """The names of all sequences that have been added and have not ended."""
        with self._names_lock:
            return {*self._names}

    def begin(self, name: str, count: int) -> bool:
        """Add a request that will have `count` forks. Returns False, and adds nothing, if one of
        the names is that of a running request."""
        names = {name, *fork_names(name, count)}
        with self._names_lock:
            if names & self._names:
                return False
            self._names |= names
            return True

    def remove(self, names: Iterable[str]) -> None:
        """Remove sequences that will have no further output."""
        with self._names_lock:
            self._names.difference_update(names)

    def cancelled(self, state: RequestState) -> None:
        """Remove a request that was cancelled, which has no output unless it was aborted."""
        names = [state.request_id, *fork_names(state.request_id, state.num_children)]
        for name in self.aborted.intersection(names):
            state.status = RequestStatus.FINISHED
            output: Any = state.to_generation_output()
            self.deliver(dataclasses.replace(output, request_id=name, finish_reason="abort"))
        self.remove(names)

    def deliver(self, output: GenerationOutput) -> None:
        if output.is_finished():
            self.remove([output.request_id])
        super().deliver(output)

    def deliver_batch(self, outputs: list[GenerationOutput]) -> None:
        self.remove(output.request_id for output in outputs if output.is_finished())
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

    @property
    def usage(self) -> float:
        """The share of the cache that running sequences take. Blocks that are only kept for later
        requests to find do not count."""
        allocators = self.cache_allocators.values()
        kept = sum(len(a.ledger.cached_blocks) * a.bytes_per_block for a in allocators)
        unused = kept + self.compute_free_capacity(relative=False)
        return float(1 - unused / (self.num_sectors * self.bytes_per_sector))

    def can_store_request_tokens(
        self, state: RequestState, request_len: int, dry_run: bool = False
    ) -> bool:
        """Whether there is room for so many tokens of a request, if need be without its draft."""
        if super().can_store_request_tokens(state, request_len, dry_run):
            return True
        if state.status != RequestStatus.DECODING or request_len == 1:
            return False
        del state.tokens_to_process[1:]  # in place: the scheduler schedules this list
        return bool(super().can_store_request_tokens(state, 1, dry_run))

    def search_prefix_match(self, request_id: str, prompt_ids: list[int]) -> int:
        """How many of the prompt's tokens are in the cache, computed by the same adapter."""
        state = self.waiting(request_id)
        if isinstance(state, AdapterRequest):
            with suppress(LorafxError), self.session.lock:  # the step itself raises it
                self.session.follow()
            # New weights change this number, so later requests do not find the blocks of this one.
            state.weights = weights_now(self.session)
            if state.scoring:
                return 0  # of tokens that are not computed nothing is known
            if state.num_children:
                # transformers forks a request before the last token, in a step with one before it.
                prompt_ids = prompt_ids[:-1]
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
