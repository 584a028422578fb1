"""What a request may ask the engine for, looked at before it is queued.

The engine looks at some of it where it makes a step, and then all requests of the step fail, or the
engine ends. So a request that cannot be served is refused where it is added.
"""

from __future__ import annotations

import operator
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any, SupportsFloat

import torch
from transformers import GenerationConfig
from transformers.generation.continuous_batching.cb_logits_processors import (
    ContinuousBatchingLogitsProcessorList,
)

from lorafx.errors import BatchError, ConfigError

#: What a request may say of how its tokens are chosen. Temperatures become float32.
RANGES: Mapping[str, tuple[float, float]] = {
    "temperature": (0.0, float(torch.finfo(torch.float32).max)),
    "top_k": (-1, sys.maxsize),
    "top_p": (0.0, 1.0),
}
#: What they are where nobody says.
UNSAID: Mapping[str, float] = {"temperature": 1.0, "top_k": 0, "top_p": 1.0}
#: What else clients send, with the value that asks for nothing.
NEUTRAL: Mapping[str, float] = {
    "min_p": 0,
    "typical_p": 1,
    "epsilon_cutoff": 0,
    "eta_cutoff": 0,
    "repetition_penalty": 1,
    "presence_penalty": 0,
    "frequency_penalty": 0,
    "length_penalty": 1,
    "no_repeat_ngram_size": 0,
    "min_new_tokens": 0,
}


def checked_prompt(model: Any, input_ids: Sequence[int]) -> list[int]:
    """The token ids of a prompt.

    Raises:
        BatchError: they are none of the model's.
    """
    try:
        prompt = [operator.index(token) for token in input_ids]
    except TypeError as error:
        raise BatchError(
            f"input_ids holds the token ids of one prompt, which are integers: {error}"
        ) from error
    if not prompt:
        raise BatchError("input_ids is empty; give at least one token")
    known = _vocabulary(model)
    if known is not None and not 0 <= min(prompt) <= max(prompt) < known:
        raise BatchError(
            f"input_ids holds {min(prompt)} to {max(prompt)}, but the model has embeddings "
            f"for 0 to {known - 1}"
        )
    return prompt


def check_name(request_id: str | None) -> None:
    """Look at what a request is called.

    Raises:
        ConfigError: it is no string.
    """
    if request_id is not None and not isinstance(request_id, str):
        raise ConfigError(f"request_id is a string; got {request_id!r}")


def checked_limits(
    max_new_tokens: int | None, eos_token_id: int | Iterable[int] | None
) -> tuple[int | None, list[int] | None]:
    """After how many tokens an answer ends, and with which; numbers of NumPy's and tensors are
    numbers too.

    Raises:
        ConfigError: a value is of no use.
    """
    most = None if max_new_tokens is None else _number(max_new_tokens)
    if max_new_tokens is not None and (most is None or most < 0):
        raise ConfigError(f"max_new_tokens is a number of tokens; got {max_new_tokens!r}")
    if eos_token_id is None:
        return most, None
    one = _number(eos_token_id)
    given: list[Any] = [one]  # None where it is neither one number nor several
    if one is None and isinstance(eos_token_id, Iterable):
        with suppress(TypeError):  # a tensor without a dimension
            given = list(eos_token_id)
    ends = [number for token in given if (number := _number(token)) is not None]
    if len(ends) < len(given):
        raise ConfigError(f"eos_token_id is a token id or a list of them; got {eos_token_id!r}")
    return most, ends


def sampling_number(name: str, value: Any) -> float | None:
    """`value` where it is one that `name` of `RANGES` can have; else None."""
    low, high = RANGES[name]
    number = _number(value) if isinstance(low, int) else _fraction(value)
    return number if number is not None and low <= number <= high else None


def sampling_range(name: str) -> str:
    """What `name` of `RANGES` can be, as messages say it."""
    low, high = RANGES[name]
    return f"{'an integer' if isinstance(low, int) else 'a number'} from {low:g} to {high:g}"


def checked_sampling(
    processors: ContinuousBatchingLogitsProcessorList,
    given: Mapping[str, Any],
    config: GenerationConfig,
) -> dict[str, Any]:
    """How a request wants its tokens chosen, without what asks for nothing, or for what an engine
    of this `config` does anyway.

    Raises:
        ConfigError: the engine was not started for such an argument, or no token can be chosen with
            its value.
    """
    asked: dict[str, Any] = {}
    for name, value in given.items():
        if value is None:
            continue
        if name not in RANGES:
            if name not in NEUTRAL or _fraction(value) != NEUTRAL[name]:
                asked[name] = value
            continue
        number = sampling_number(name, value)
        if number is None:
            raise ConfigError(f"{name} is {sampling_range(name)}; got {value!r}")
        if name in processors.supported_keys:
            asked[name] = number
        elif config.do_sample:
            of_engine = getattr(config, name)
            unsaid = UNSAID[name] if of_engine is None else of_engine
            if max(number, 0) != unsaid:  # top_k -1 is 0
                asked[name] = number
        elif name == "temperature" and number:
            asked[name] = number
        # Else the likeliest token is the likeliest of any number of tokens.
    try:
        processors.check_kwargs(asked)
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"this engine does not choose a request's tokens by {', '.join(asked)}: {error}. Start "
            "it with GenerationConfig(do_sample=True) and "
            "ContinuousBatchingConfig(per_request_processors=True) for temperature, top_k and top_p"
        ) from error
    return asked


def _fraction(value: Any) -> float | None:
    """`value` where it is a number; else None."""
    if isinstance(value, bool) or not isinstance(value, SupportsFloat):
        return None
    with suppress(OverflowError, RuntimeError, TypeError, ValueError):  # several, or no data
        return float(value)
    return None


def _number(value: Any) -> int | None:
    """`value` where it is an integer, of Python, of NumPy or a tensor; else None."""
    try:
        return None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        return None


def _vocabulary(model: Any) -> int | None:
    """How many token ids the model has embeddings for; None where it does not say."""
    known: int | None = getattr(model.get_input_embeddings(), "num_embeddings", None)
    return known
