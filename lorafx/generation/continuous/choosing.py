"""The stage between the logits of a step and its new tokens, by what requests ask of them
(`parameters.py`):

    logits (B, V)  →  log-probabilities, of these logits
                   →  + logit_bias  →  penalties  →  −∞ for words and ends that may not come yet,
                      and for what the grammar excludes
                   →  the likeliest tokens; or / temperature  →  −∞ by top_k, top_p and min_p
                      →  drawn ones, by the numbers of their requests' seeds
                   →  which sequences end

It works on all rows of a step together, and is skipped by steps in which no request asks. A request
for which no token is left, or whose grammar raises, fails alone.
"""

from __future__ import annotations

import math
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor
from transformers.generation.continuous_batching.model_runner import ModelRunner
from transformers.generation.continuous_batching.requests import FutureRequestState

from lorafx.errors import BatchError
from lorafx.generation.continuous.adapter_requests import AdapterRequest, TokenLogprobs
from lorafx.generation.continuous.packed_call import PackedForward
from lorafx.generation.continuous.parameters import NOTHING, Sampling, TokenParameters

#: The rows of a prompt's logits that are looked at together.
_ROWS = 64


class Choosing(LogitsProcessor):
    """The first of an engine's processors.

    Attributes:
        rows: the requests of the step that ask for something, by their rows of its logits.
        drawn: row -> how its token is drawn; rows that are not there take the likeliest one.
    """

    supports_continuous_batching = True

    def __init__(self, packed: PackedForward, tokenizer: Any) -> None:
        self._packed = packed
        self._tokenizer = tokenizer
        self._logits: Tensor | None = None
        self.rows: list[tuple[int, AdapterRequest, TokenParameters]] = []
        self.drawn: dict[int, Sampling] = {}

    def begin(self, batch: Sequence[FutureRequestState]) -> bool:
        """Begin a step. Returns whether any of its requests asks for something."""
        new: list[Any] = [future.state for future in batch if future.has_new_token]
        asking = [(r, state, state.parameters) for r, state in enumerate(new) if state.parameters]
        self.rows = asking
        self.drawn = {r: state.sampling for r, state in enumerate(new) if state.sampling}
        return bool(asking)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """The logits (B, V) after the request's changes, in place."""
        if not self.rows:
            return scores
        self.rows = [row for row in self.rows if row[1].request_id not in self._packed.failed]
        shown = self._shown()
        self._logits = scores[[row for row, _, _ in shown]] if shown else None
        bias = [
            (row, token, number)
            for row, _, asked in self.rows
            for token, number in asked.logit_bias.items()
        ]
        if bias:
            rows, tokens, numbers = zip(*bias, strict=True)
            scores[_places(rows, tokens, scores)] += torch.tensor(numbers).to(scores)
        self._penalize(scores)
        self._exclude(scores)
        return scores

    def _shown(self) -> list[tuple[int, AdapterRequest, int]]:
        """The requests that ask for log-probabilities, and for how many."""
        return [(r, state, a.logprobs) for r, state, a in self.rows if a.logprobs is not None]

    def _penalize(self, scores: Tensor) -> None:
        rows = [row for row in self.rows if row[2].penalties != NOTHING.penalties]
        if not rows:
            return
        counts = [state.counts() for _, state, _ in rows]
        tokens = _integers(chain.from_iterable(counts))
        known = tokens < scores.shape[-1]  # a prompt may have tokens that the head lacks
        lengths = torch.tensor([len(count) for count in counts])
        owners = torch.arange(len(rows)).repeat_interleave(lengths)[known]
        at = _places(torch.tensor([row for row, _, _ in rows])[owners], tokens[known], scores)
        times = _integers(chain.from_iterable(count.values() for count in counts))
        times = times[known].to(scores)
        numbers = torch.tensor([asked.penalties for _, _, asked in rows])[owners]
        repetition, frequency, presence = numbers.to(scores).unbind(1)
        old = scores[at]
        new = torch.where(old > 0, old / repetition, old * repetition)
        scores[at] = new - frequency * times - presence * (times > 0)

    def _exclude(self, scores: Tensor) -> None:
        """Set the logits of tokens that may not come to −∞."""
        excluded: list[tuple[int, int]] = []
        masks: dict[int, Tensor] = {}
        size = scores.shape[-1]
        for row, state, asked in self.rows:
            excluded += [(row, token) for token in _excluded(asked, state.generated)]
            if asked.allowed_token_ids:
                masks[row] = torch.zeros(size, dtype=torch.bool)
                masks[row][_integers(asked.allowed_token_ids)] = True
            if state.grammar is not None:
                try:
                    mask = state.grammar.bitmask(state.generated)[:size].cpu().bool()
                    mask = torch.nn.functional.pad(mask, (0, size - len(mask)))
                    masks[row] = mask & masks.get(row, mask)
                except Exception as error:
                    self._refuse(state, f"its grammar raised {type(error).__name__}: {error}")
        if excluded:
            rows, tokens = zip(*excluded, strict=True)
            scores[_places(rows, tokens, scores)] = -torch.inf
        if masks:
            missing = ~torch.stack([*masks.values()]).to(scores.device)
            scores[[*masks]] = scores[[*masks]].masked_fill(missing, -torch.inf)
        many = Counter(row for row, _ in excluded)
        for row, state, _ in self.rows:
            if row not in masks and many[row] < size:
                continue
            if scores[row].amax() == -torch.inf:
                self._refuse(
                    state, "bad_words, min_tokens, allowed_token_ids and its grammar leave no token"
                )
                scores[row] = 0.0  # a token of this row is chosen, too

    def _refuse(self, state: AdapterRequest, why: str) -> None:
        """Fail a request by what it asked for."""
        state.refused = True
        self._fail(state, why)

    def _fail(self, state: AdapterRequest, why: str) -> None:
        self._packed.failed[state.request_id] = BatchError(f"this request failed: {why}")

    def numbers(self, rows: Sequence[int]) -> Tensor:
        """A number from 0 to 1 for each of these rows, (K, 1): of a request with a seed, that of
        its next token."""
        numbers = torch.rand(len(rows), 1, dtype=torch.float64)
        places = {row: place for place, row in enumerate(rows)}
        for row, state, asked in self.rows:
            if asked.seed is not None and row in places:
                numbers[places[row]] = state.draw(asked.seed)
        return numbers

    def end(self, tokens: Sequence[int], logprobs: Sequence[float] | None = None) -> None:
        """Note what was chosen, and which sequences end with it. `tokens` has one for each row, and
        `logprobs` its log-probability as it was chosen, if a row asks for it."""
        logits, self._logits = self._logits, None
        if logits is not None:
            shown = self._shown()
            chosen = [tokens[row] for row, _, _ in shown]
            found = described(logits, chosen, [count for _, _, count in shown])
            for (_, state, _), newest in zip(shown, found, strict=True):
                state.newest = newest
        for row, state, asked in self.rows:
            if state.request_id in self._packed.failed:
                continue
            state.chosen_logprob = logprobs[row] if logprobs and asked.return_logprobs else None
            try:
                state.ends, state.stop_reason = self._ending(state, asked, tokens[row])
            except Exception as error:
                self._refuse(
                    state, f"its stop or its grammar raised {type(error).__name__}: {error}"
                )

    def _ending(
        self, state: AdapterRequest, asked: TokenParameters, token: int
    ) -> tuple[bool, int | str | None]:
        """Whether the sequence ends with `token`, and the stop that is the reason."""
        if token in state._eos_token_ids:
            return True, None
        if token in asked.stop_ids:
            return True, asked.stop_ids[token]
        generated = [*state.generated, token]
        if asked.stop and len(generated) > asked.min_tokens:
            # A token has at least one byte of text, so these have more than the longest stop.
            last = generated[-4 * max(map(len, asked.stop)) - 8 :]
            text = self._text(last)
            stops = [stop for stop in asked.stop if stop in text]
            if stops:  # of which those were no stops that were complete before `min_tokens`
                before = self._text(last[:-1])
                places = {stop: text.find(stop, before.rfind(stop) + 1) for stop in stops}
                stops = [stop for stop in stops if places[stop] >= 0]
            if stops:
                return True, min(stops, key=lambda stop: places[stop])
        return state.grammar is not None and state.grammar.ended(generated), None

    def _text(self, tokens: Sequence[int]) -> str:
        return str(
            self._tokenizer.decode(
                tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
        )

    def score_prompts(self) -> None:
        """Note the log-probabilities of tokens of prompts that this step tells."""
        scored, self._packed.scored = self._packed.scored, []
        for state, rows in scored:
            if state.request_id in self._packed.failed:
                continue
            count = (state.parameters or NOTHING).prompt_logprobs or 0
            for part in rows.split(_ROWS):
                first = len(state.prompt_logprobs)
                tokens = state.initial_tokens[first : first + len(part)]
                found = described(part, tokens, [count] * len(part))
                if any(math.isnan(token.logprob) for token in found):
                    self._fail(state, "the logits of its prompt are not finite")
                    break
                state.prompt_logprobs += found


class ChoosingRunner(ModelRunner):
    """A runner with the stage `choosing`. If `do_sample`, each token is drawn from the logits as
    they are; otherwise those of requests that draw. The others are the likeliest."""

    choosing: Choosing

    def _sample(self, scores: Tensor, output_ids: Tensor) -> None:
        logits, choosing = scores[0], self.choosing
        tokens = output_ids[0, : len(logits)]
        drawn = [*(range(len(logits)) if self.do_sample else choosing.drawn)]
        if len(drawn) < len(logits):
            super()._sample(scores, output_ids)
        if drawn:
            shares = logits.softmax(-1)
            if not self.do_sample:
                shares = shares_of(logits[drawn], [*choosing.drawn.values()])
            tokens[drawn] = drawn_tokens(choosing, drawn, shares).to(tokens.dtype)
        if not choosing.rows:
            return
        logprobs = None
        if any(asked.return_logprobs for _, _, asked in choosing.rows):
            places = tokens.long()[:, None]
            found = logits.log_softmax(-1).gather(1, places)
            if drawn:
                found[drawn] = shares.gather(1, places[drawn]).log()
            logprobs = found[:, 0].tolist()
        choosing.end(tokens.tolist(), logprobs)


def drawn_tokens(choosing: Choosing, rows: Sequence[int], shares: Tensor) -> Tensor:
    """A token for each of these rows from `shares` (K, V): torch.multinomial takes 20 times as
    long. In float64 a number below 1 times the sum stays below the sum."""
    sums = shares.cumsum(-1, dtype=torch.float64)
    numbers = choosing.numbers(rows).to(sums.device)
    return torch.searchsorted(sums, numbers * sums[:, -1:], right=True)[:, 0]


def shares_of(logits: Tensor, asked: Sequence[Sampling]) -> Tensor:
    """The probabilities (K, V) by which tokens are drawn, each row as is asked for it."""
    temperatures = torch.tensor([sampling.temperature for sampling in asked]).to(logits)
    scores, size = logits / temperatures[:, None], logits.shape[-1]

    def cut(numbers: Sequence[float], least: Callable[[Tensor, Tensor], Tensor]) -> None:
        """Leave out the tokens below the least scores; rows whose number is 0 keep all."""
        rows = [row for row, number in enumerate(numbers) if number]
        if rows:
            kept, asked_for = scores[rows], torch.tensor([numbers[row] for row in rows])
            bounds = least(kept, asked_for.to(scores.device)[:, None])
            scores[rows] = kept.masked_fill(kept < bounds, -torch.inf)

    counts = [sampling.top_k if 0 < sampling.top_k < size else 0 for sampling in asked]
    cut(counts, lambda kept, k: kept.sort(descending=True).values.gather(-1, k - 1))
    cut([1 - sampling.top_p for sampling in asked], _least_of_share)
    cut([sampling.min_p for sampling in asked], lambda kept, p: kept.amax(-1, True) + p.log())
    return scores.softmax(-1)


def _least_of_share(scores: Tensor, left_out: Tensor) -> Tensor:
    """The score, (K, 1), of the likeliest token below which tokens have this share together."""
    ascending = scores.sort().values
    below = (ascending.softmax(-1).cumsum(-1) <= left_out).sum(-1, keepdim=True)
    return ascending.gather(-1, below.clamp(max=scores.shape[-1] - 1))


def described(logits: Tensor, tokens: Sequence[int], counts: Sequence[int]) -> list[TokenLogprobs]:
    """The log-probability of a token for each row of `logits` (K, V), with as many likeliest tokens
    as `counts` says."""
    logprobs = logits.float().log_softmax(-1)
    chosen = logprobs.gather(-1, torch.tensor(tokens, device=logits.device)[:, None])
    ranks = (logprobs > chosen).sum(-1) + 1
    values, ids = logprobs.topk(min(max(counts), logprobs.shape[-1]))
    columns = (chosen[:, 0], ranks, ids, values)
    return [
        TokenLogprobs(token, logprob, rank, tuple(zip(likeliest[:count], top, strict=False)))
        for token, count, logprob, rank, likeliest, top in zip(
            tokens, counts, *(column.tolist() for column in columns), strict=True
        )
    ]


def _integers(values: Iterable[int]) -> Tensor:
    """A tensor of at least one number: torch.tensor takes eight times as long."""
    return torch.frombuffer(array("q", values), dtype=torch.int64)


def _places(rows: Any, tokens: Any, scores: Tensor) -> tuple[Tensor, Tensor]:
    """Indices of `scores` for these rows and tokens."""
    at = torch.stack([torch.as_tensor(rows), torch.as_tensor(tokens)]).to(scores.device)
    return at[0], at[1]


def _excluded(asked: TokenParameters, generated: Sequence[int]) -> list[int]:
    """The tokens that may not come next."""
    ends = asked.ends if len(generated) < asked.min_tokens else ()
    words = [
        word[-1]
        for word in asked.bad_words
        if [*word[:-1]] == [*generated[len(generated) - len(word) + 1 :]]
    ]
    return [*ends, *words]
