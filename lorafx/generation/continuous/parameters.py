"""What a request asks of its tokens beyond temperature, top_k and top_p: which they may be, when
they end, and what its outputs tell of them. Everything is checked before the request is queued,
since in a step it would fail the requests beside it.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Protocol

from torch import Tensor

from lorafx.errors import ConfigError
from lorafx.generation.continuous.sampling import checked_number


class Grammar(Protocol):
    """Which tokens a sequence may have. Both methods are called with all tokens that the sequence
    has generated, which between calls only become more. Each sequence of a request has its own
    grammar, a `copy.deepcopy` of the one that was given. Errors fail the request."""

    def bitmask(self, generated: Sequence[int]) -> Tensor:
        """Which tokens may come next: (vocabulary,) bool, on the CPU."""

    def ended(self, generated: Sequence[int]) -> bool:
        """Whether the sequence is complete. It ends then, with the finish reason "stop"."""


@dataclass(frozen=True)
class TokenParameters:
    """The checked arguments of a request (`AdapterBatchingManager.add_request`).

    Attributes:
        bad_words: sequences of tokens that may not be generated, each in all its spellings.
        ends: the tokens that end the sequence, which may not come before `min_tokens` tokens.
        stop_ids: tokens that end the sequence -> the reason that outputs give.
    """

    seed: int | None = None
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    bad_words: Sequence[Sequence[int]] = ()
    min_tokens: int = 0
    ends: Sequence[int] = ()
    stop: Sequence[str] = ()
    stop_ids: Mapping[int, int | str] = field(default_factory=dict)
    logprobs: int | None = None
    prompt_logprobs: int | None = None

    @property
    def penalties(self) -> tuple[float, float, float]:
        """The penalties of repetition, frequency and presence."""
        return self.repetition_penalty, self.frequency_penalty, self.presence_penalty

    def __deepcopy__(self, memo: object) -> TokenParameters:
        """Sequences of one request share these values, which do not change."""
        return self


NOTHING = TokenParameters()
#: The names of the arguments.
ARGUMENTS = {f.name for f in fields(TokenParameters)} - {"ends", "stop_ids"} | {"stop_token_ids"}


def checked_parameters(
    arguments: Mapping[str, Any], tokenizer: Any, size: int, eos: Iterable[int]
) -> TokenParameters:
    """The `arguments` of a request, of which those that are None are as if left out.

    Args:
        tokenizer: the model's, or None.
        size: the number of tokens for which the model has logits.
        eos: the tokens at which the sequence ends anyway.

    Raises ConfigError for what cannot be honoured.
    """
    given = {name: value for name, value in arguments.items() if value is not None}
    stop = _strings("stop", given.pop("stop", ()), tokenizer)
    words = _strings("bad_words", given.pop("bad_words", ()), tokenizer)
    stop_ids = _ids("stop_token_ids", given.pop("stop_token_ids", ()), size)
    bias = given.pop("logit_bias", {})
    if not isinstance(bias, Mapping):
        raise ConfigError(f"logit_bias has a number for each of some token ids; got {bias!r}")
    numbers = [checked_number("logit_bias", number) for number in bias.values()]
    values: dict[str, Any] = {name: checked_number(name, value) for name, value in given.items()}
    reasons: dict[int, int | str] = {token: token for token in stop_ids}
    if stop:  # special tokens have no text, so they are found by their ids
        added = tokenizer.added_tokens_decoder.items()
        reasons |= {i: str(t) for i, t in added if t.special and str(t) in stop}
    ends = {token for token in (*eos, *reasons) if 0 <= token < size and values.get("min_tokens")}
    return TokenParameters(
        **values,
        stop=stop,
        stop_ids=reasons,
        bad_words=tuple(
            ids for word in words for ids in _spellings(word, tokenizer) if max(ids) < size
        ),
        logit_bias=dict(zip(_ids("logit_bias", bias, size), numbers, strict=True)),
        ends=tuple(ends),
    )


def _strings(name: str, value: Any, tokenizer: Any) -> tuple[str, ...]:
    strings = (value,) if isinstance(value, str) else value
    if not isinstance(strings, Sequence) or not all(isinstance(s, str) and s for s in strings):
        raise ConfigError(f"{name} is a list of strings, none of them empty; got {value!r}")
    if strings and tokenizer is None:
        raise ConfigError(
            f"{name} needs the model's tokenizer, which this engine was not given: start it with "
            "continuous_batching(..., tokenizer=tokenizer)"
        )
    return tuple(strings)


def _ids(name: str, value: Iterable[Any], size: int) -> list[int]:
    try:
        ids = [operator.index(token) for token in value]
    except TypeError as error:
        raise ConfigError(f"{name} holds token ids, which are integers; got {value!r}") from error
    if ids and not 0 <= min(ids) <= max(ids) < size:
        raise ConfigError(
            f"{name} holds {min(ids)} to {max(ids)}, but the model has tokens 0 to {size - 1}"
        )
    return ids


def _spellings(word: str, tokenizer: Any) -> list[tuple[int, ...]]:
    """The tokens of `word` at the beginning of a text and after a space."""
    texts = (word, f" {word.lstrip()}")
    ids = [tuple(tokenizer.encode(text, add_special_tokens=False)) for text in texts]
    return [tokens for tokens in dict.fromkeys(ids) if tokens]
