"""What a request asks of its tokens: how they are chosen, which they may be, when they end, and
what its outputs tell of them. Everything is checked before the request is queued, since in a step
it would fail the requests beside it.
"""

from __future__ import annotations

import operator
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple, Protocol, SupportsFloat, cast

import torch
from torch import Tensor

from lorafx.errors import BatchError, ConfigError, LorafxError, nearest
from lorafx.model.targets import input_embedding

#: The ranges of arguments that are numbers. Temperatures become float32.
RANGES: Mapping[str, tuple[float, float]] = {
    "temperature": (0.0, float(torch.finfo(torch.float32).max)),
    "top_k": (-1, sys.maxsize),
    "top_p": (0.0, 1.0),
    "min_p": (0.0, 1.0),
    "presence_penalty": (-2.0, 2.0),
    "frequency_penalty": (-2.0, 2.0),
    "repetition_penalty": (0.01, 100.0),
    "logit_bias": (-100.0, 100.0),
    "seed": (-sys.maxsize, sys.maxsize),
    "min_tokens": (0, sys.maxsize),
    "max_new_tokens": (0, sys.maxsize),
    "logprobs": (0, sys.maxsize),
    "prompt_logprobs": (0, sys.maxsize),
    "n": (1, 1024),
    "num_assistant_tokens": (1, 1024),
    "prompt_lookup_num_tokens": (1, 1024),
}
#: How many strings `stop` and `bad_words` may have. Each step looks at all of them.
MOST_STRINGS = 1024


class Grammar(Protocol):
    """Which tokens a sequence may have. Both methods are called with all tokens that the sequence
    has generated, which between calls only become more. Each sequence of a request has its own
    grammar, a `copy.deepcopy` of the one that was given. Errors fail the request."""

    def bitmask(self, generated: Sequence[int]) -> Tensor:
        """Which tokens may come next: (vocabulary,) bool, on the CPU."""

    def ended(self, generated: Sequence[int]) -> bool:
        """Whether the sequence is complete. It ends then, with the finish reason "stop"."""


class Sampling(NamedTuple):
    """How a request draws its tokens. top_k: 0, -1 and numbers above the vocabulary's size keep all
    tokens."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0


#: Lower temperatures take the likeliest token. vLLM has the same bound.
COLDEST = 1e-5


@dataclass(frozen=True)
class TokenParameters:
    """The other arguments of a request (`AdapterBatchingManager.add_request`), checked.

    Attributes:
        bad_words: sequences of tokens that may not be generated, each in all its spellings.
        allowed_token_ids: the only tokens that may be generated; all if there are none.
        ends: the tokens that end the sequence, which may not come before `min_tokens` tokens.
        stop_ids: tokens that end the sequence -> the reason that outputs give.
    """

    seed: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    bad_words: Sequence[Sequence[int]] = ()
    allowed_token_ids: Sequence[int] = ()
    min_tokens: int = 0
    ends: Sequence[int] = ()
    stop: Sequence[str] = ()
    stop_ids: Mapping[int, int | str] = field(default_factory=dict)
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    return_logprobs: bool = False

    @property
    def penalties(self) -> tuple[float, float, float]:
        """The penalties of repetition, frequency and presence."""
        return self.repetition_penalty, self.frequency_penalty, self.presence_penalty

    def __deepcopy__(self, memo: object) -> TokenParameters:
        """Sequences of one request share these values, which do not change."""
        return self


NOTHING = TokenParameters()
#: The names of those arguments.
ARGUMENTS = {f.name for f in fields(TokenParameters)} - {"ends", "stop_ids", "return_logprobs"} | {
    "stop_token_ids"
}


class ArgumentError(ConfigError):
    """An argument of a request is refused. `argument`: its name, which begins the message."""

    def __init__(self, argument: str, why: str) -> None:
        super().__init__(f"{argument} {why}")
        self.argument = argument


def checked_number(name: str, value: Any) -> Any:
    """`value` as a number. Raises ArgumentError if it is none, or not in the range of `name`."""
    low, high = RANGES[name]
    kind, convert = "a number", cast("Callable[[Any], float]", float)
    if isinstance(low, int):
        kind, convert = "an integer", operator.index
    if isinstance(value, SupportsFloat) and not isinstance(value, bool):
        # Tensors, arrays and large integers raise these.
        with suppress(OverflowError, RuntimeError, TypeError, ValueError):
            number = convert(value)
            if low <= number <= high:
                return number
    raise ArgumentError(name, f"is {kind} from {low:g} to {high:g}; got {value!r:.80}")


def checked_ids(
    name: str,
    value: Any,
    size: int | None = None,
    error: Callable[[str, str], LorafxError] = ArgumentError,
) -> list[int]:
    """`value` as a list of token ids. Raises `error` of the name, and why, if it is none, or has
    ids that are not below `size`."""
    try:
        ids = [operator.index(token) for token in value]
        if any(isinstance(token, bool) for token in value):
            raise TypeError("true and false are no token ids")
    except TypeError as cause:
        why = f"holds token ids, which are integers; got {value!r:.80}"
        raise error(name, why) from cause
    if size is not None and ids and not 0 <= min(ids) <= max(ids) < size:
        raise error(
            name, f"holds {min(ids)} to {max(ids)}, but the model has tokens 0 to {size - 1}"
        )
    return ids


def checked_prompt(model: Any, input_ids: Iterable[Any]) -> list[int]:
    """The token ids of a prompt. Raises BatchError unless they are ids of the model."""
    size = getattr(input_embedding(model), "num_embeddings", None)
    prompt = checked_ids("input_ids", input_ids, size, lambda *why: BatchError(" ".join(why)))
    if not prompt:
        raise BatchError("input_ids is empty; give at least one token")
    return prompt


def vocabulary_of(model: Any) -> int:
    """The number of tokens for which a model has logits."""
    return int(getattr(model.get_output_embeddings(), "out_features", 0)) or int(
        model.config.get_text_config().vocab_size
    )


def ends_of(eos_token_id: Any) -> list[int]:
    """The tokens of an `eos_token_id`, which is one, several or None. Raises ConfigError if it is
    none of these."""
    try:
        return [operator.index(eos_token_id)]
    except TypeError:
        return checked_ids("eos_token_id", () if eos_token_id is None else eos_token_id)


def checked_sampling(arguments: Mapping[str, Any], defaults: Sampling | None) -> Sampling | None:
    """How a request draws its tokens; None if it takes the likeliest ones, or if requests have no
    choice. `defaults` are those of the engine, None if it chooses alike for all requests. Raises
    ConfigError if it does and there are `arguments`, or if no token can be chosen with one."""
    given = {name: value for name, value in arguments.items() if value is not None}
    numbers = {name: checked_number(name, value) for name, value in given.items()}
    if given and defaults is None:
        raise ConfigError(
            f"this engine does not choose a request's tokens by {', '.join(given)}: start it with "
            "GenerationConfig(do_sample=True) and "
            "ContinuousBatchingConfig(per_request_processors=True)"
        )
    asked = None if defaults is None else defaults._replace(**numbers)
    return None if asked is None or asked.temperature < COLDEST else asked


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
    for name in given.keys() - ARGUMENTS:
        raise ConfigError(f"a request has no argument {name!r}{nearest(name, ARGUMENTS)}")
    stop = _strings("stop", given.pop("stop", ()), tokenizer)
    words = _strings("bad_words", given.pop("bad_words", ()), tokenizer)
    stop_ids = checked_ids("stop_token_ids", given.pop("stop_token_ids", ()), size)
    allowed = given.pop("allowed_token_ids", None)
    if allowed is not None and not checked_ids("allowed_token_ids", allowed, size):
        raise ArgumentError(
            "allowed_token_ids", "is empty, so no token may come; leave it out for all"
        )
    bias = given.pop("logit_bias", {})
    if not isinstance(bias, Mapping):
        why = f"has a number for each of some token ids; got {bias!r:.80}"
        raise ArgumentError("logit_bias", why)
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
        allowed_token_ids=tuple(allowed or ()),
        logit_bias=dict(zip(checked_ids("logit_bias", bias, size), numbers, strict=True)),
        ends=tuple(ends),
    )


def _strings(name: str, value: Any, tokenizer: Any) -> tuple[str, ...]:
    strings = (value,) if isinstance(value, str) else value
    if not isinstance(strings, Sequence) or not all(isinstance(s, str) and s for s in strings):
        raise ArgumentError(name, f"is a list of strings, none of them empty; got {value!r:.80}")
    if len(strings) > MOST_STRINGS:
        raise ArgumentError(name, f"has at most {MOST_STRINGS} strings; got {len(strings)}")
    if strings and tokenizer is None:
        raise ArgumentError(
            name,
            "needs the model's tokenizer, which this engine was not given: start it with "
            "continuous_batching(..., tokenizer=tokenizer)",
        )
    return tuple(strings)


def _spellings(word: str, tokenizer: Any) -> list[tuple[int, ...]]:
    """The tokens of `word` at the beginning of a text and after a space."""
    texts = (word, f" {word.lstrip()}")
    ids = [tuple(tokenizer.encode(text, add_special_tokens=False)) for text in texts]
    return [tokens for tokens in dict.fromkeys(ids) if tokens]
