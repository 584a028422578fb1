"""What an engine may be asked for where adapters are served, and what a request may ask it for. In
a step of the engine an error would be everybody's, or end the engine."""

from __future__ import annotations

import dataclasses
import operator
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any, SupportsFloat, cast

import torch
from transformers import GenerationConfig
from transformers.generation.configuration_utils import ContinuousBatchingConfig
from transformers.generation.continuous_batching.cb_logits_processors import (
    ContinuousBatchingLogitsProcessorList,
)

from lorafx.errors import BatchError, ConfigError
from lorafx.generation.continuous.scheduling import within_slots
from lorafx.torch_internals.transformers_parts import devices_of_async_batching

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
_COMPILED = "lorafx compiles the model itself"
_PADDED = "only CUDA graphs and compilation by the engine pad"
#: What a configuration may ask for that is not served, and why.
_REFUSED: Mapping[str, str] = {
    "use_cuda_graph": (
        "a replayed graph runs nothing on the host, where the slot of each token is written and "
        "mixes are refused"
    ),
    "varlen_compile_config": _COMPILED,
    "decode_compile_config": _COMPILED,
    "default_compile_level": _COMPILED,
    "q_padding_interval_size": _PADDED,
    "kv_padding_interval_size": _PADDED,
}


def served_config(
    config: ContinuousBatchingConfig | None, device: torch.device
) -> ContinuousBatchingConfig:
    """The configuration with what is not served switched off; ConfigError where it asks for that,
    or for what this device cannot do."""
    config = ContinuousBatchingConfig() if config is None else config
    for name, why in _REFUSED.items():
        value = getattr(config, name)
        if value and value != (False, False):
            raise ConfigError(
                f"ContinuousBatchingConfig({name}={value!r}) is not served with adapters: {why}. "
                f"Leave {name} out"
            )
    able = devices_of_async_batching()
    if config.use_async_batching and device.type not in able:
        raise ConfigError(
            "ContinuousBatchingConfig(use_async_batching=True) needs streams of a device of type "
            f"{' or '.join(able)}, and the model is on {device}. Leave use_async_batching out"
        )
    return dataclasses.replace(
        config,
        use_cuda_graph=False,
        use_async_batching=bool(config.use_async_batching),
        auto_switch_to_flash=False,
        scheduler_type=within_slots(config.scheduler_type),
    )


def checked_prompt(model: Any, input_ids: Sequence[int]) -> list[int]:
    """The token ids of a prompt; BatchError where they are none of the model's."""
    try:
        prompt = [operator.index(token) for token in input_ids]
    except TypeError as error:
        raise BatchError(
            f"input_ids holds the token ids of one prompt, which are integers: {error}"
        ) from error
    if not prompt:
        raise BatchError("input_ids is empty; give at least one token")
    known: int | None = getattr(model.get_input_embeddings(), "num_embeddings", None)
    if known is not None and not 0 <= min(prompt) <= max(prompt) < known:
        raise BatchError(
            f"input_ids holds {min(prompt)} to {max(prompt)}, but the model has embeddings "
            f"for 0 to {known - 1}"
        )
    return prompt


def checked_limits(
    max_new_tokens: int | None, eos_token_id: int | Iterable[int] | None
) -> tuple[int | None, list[int] | None]:
    """After how many tokens an answer ends, and with which. Raises ConfigError."""
    most = None if max_new_tokens is None else _integer(max_new_tokens)
    if max_new_tokens is not None and (most is None or most < 0):
        raise ConfigError(f"max_new_tokens is a number of tokens; got {max_new_tokens!r}")
    if eos_token_id is None:
        return most, None
    single, several = _integer(eos_token_id), cast("Iterable[int]", eos_token_id)
    try:
        return most, [operator.index(token) for token in several] if single is None else [single]
    except TypeError as error:
        raise ConfigError(
            f"eos_token_id is a token id or a list of them; got {eos_token_id!r}"
        ) from error


def sampling_number(name: str, value: Any) -> float | None:
    """`value` where it is one that `name` of `RANGES` can have; else None."""
    low, high = RANGES[name]
    number = _integer(value) if isinstance(low, int) else _number(value)
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
    of this `config` does anyway. ConfigError where the engine was not started for such an argument,
    or no token can be chosen with its value."""
    wanted: dict[str, Any] = {}
    for name, value in given.items():
        if value is None:
            continue
        if name not in RANGES:
            if name not in NEUTRAL or _number(value) != NEUTRAL[name]:
                wanted[name] = value
            continue
        number = sampling_number(name, value)
        if number is None:
            raise ConfigError(f"{name} is {sampling_range(name)}; got {value!r}")
        if name in processors.supported_keys:
            wanted[name] = number
        elif config.do_sample:
            of_engine = getattr(config, name)
            if max(number, 0) != (UNSAID[name] if of_engine is None else of_engine):  # top_k -1
                wanted[name] = number
        elif name == "temperature" and number:
            wanted[name] = number
        # Else the likeliest token is the likeliest of any number of tokens.
    try:
        processors.check_kwargs(wanted)
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"this engine does not choose a request's tokens by {', '.join(wanted)}: {error}. "
            "Start it with GenerationConfig(do_sample=True) and "
            "ContinuousBatchingConfig(per_request_processors=True) for temperature, top_k and top_p"
        ) from error
    return wanted


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, SupportsFloat):
        return None
    with suppress(OverflowError, RuntimeError, TypeError, ValueError):  # several, or no data
        return float(value)
    return None


def _integer(value: Any) -> int | None:
    """`value` where it is an integer, of Python, of NumPy or a tensor; else None."""
    try:
        return None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        return None
