"""What a request may ask the engine for, looked at before it is queued.

The engine looks at some of it where it makes a step, and then all requests of the step fail, or the
engine ends. So a request that cannot be served is refused where it is added.
"""

from __future__ import annotations

import operator
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from transformers.generation.continuous_batching.cb_logits_processors import (
    ContinuousBatchingLogitsProcessorList,
)

from lorafx.errors import BatchError, ConfigError

#: Scores are divided by the temperature in float32: lower ones would make them infinite.
COLDEST = 1e-30


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


def check_sampling(
    processors: ContinuousBatchingLogitsProcessorList, given: Mapping[str, Any], model: Any
) -> None:
    """Look at how a request wants its tokens chosen.

    Raises:
        ConfigError: the engine was not started for such an argument, or no token can be chosen with
            its value.
    """
    try:
        processors.check_kwargs(dict(given))
    except (TypeError, ValueError) as error:
        raise ConfigError(f"the request's tokens cannot be chosen so: {error}") from error
    known = _vocabulary(model) or sys.maxsize
    for name, low, high in (
        ("temperature", COLDEST, sys.float_info.max),
        ("top_p", 0.0, 1.0),
        ("top_k", 1, known),
    ):
        if name in given and not low <= given[name] <= high:
            raise ConfigError(f"{name} is from {low:g} to {high:g}; got {given[name]!r}")


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
