"""How each request's tokens are chosen: transformers' processors of logits, with values per request
that ask for nothing.

    temperature  0 (below `COLDEST`) takes the likeliest token, as if nothing were drawn
    top_k        0 and -1 leave all tokens, and so do more than there are
    top_p        1 leaves all tokens

The processors are there whatever the engine's own values are. A step in which no request asks for
one skips it.
"""

from __future__ import annotations

import copy
import operator
import sys
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, SupportsFloat

import torch
from torch import Tensor
from transformers.generation.configuration_utils import GenerationConfig
from transformers.generation.continuous_batching.cb_logits_processors import (
    ContinuousBatchingLogitsProcessorList,
    ContinuousBatchingTemperatureLogitsWarper,
    ContinuousBatchingTopKLogitsWarper,
    ContinuousBatchingTopPLogitsWarper,
)
from transformers.generation.continuous_batching.requests import FutureRequestState

from lorafx.errors import ConfigError

#: What a request may say of how its tokens are chosen. Temperatures become float32.
RANGES: Mapping[str, tuple[float, float]] = {
    "temperature": (0.0, float(torch.finfo(torch.float32).max)),
    "top_k": (-1, sys.maxsize),
    "top_p": (0.0, 1.0),
}
#: What they are where nobody says.
UNSAID: Mapping[str, float] = {"temperature": 1.0, "top_k": 0, "top_p": 1.0}
#: Lower temperatures take the likeliest token. It is vLLM's bound.
COLDEST = 1e-5
#: top_k of a request that leaves all tokens.
ALL = torch.iinfo(torch.int32).max


class Temperature(ContinuousBatchingTemperatureLogitsWarper):
    """scores / temperature; at 0 nothing but the first of the highest scores is left.

    Attributes:
        drawn: whether a token of the step is drawn; otherwise each is the likeliest.
        likeliest: whether a token of the step is the likeliest.
    """

    drawn = likeliest = True

    def prepare_tensor_args(self, requests_with_new_token: list[FutureRequestState]) -> Tensor:
        given = super().prepare_tensor_args(requests_with_new_token).view(torch.float32)
        cold = given < COLDEST
        self.likeliest, self.drawn = bool(cold.any()), not bool(cold.all())
        return given.masked_fill(cold, 0.0).view(torch.int32)

    def __call__(self, scores: Tensor, tensor_arg: Tensor) -> Tensor:
        if not self.drawn:
            return scores
        # Rows behind those of the requests with a new token have the temperatures of earlier steps.
        temperatures = tensor_arg[: scores.shape[0]].view(torch.float32)[:, None]
        cold = temperatures == 0
        divided = scores / temperatures.masked_fill(cold, 1.0)
        if not self.likeliest:
            return divided
        best = torch.full_like(scores, -torch.inf)
        best.scatter_(-1, scores.argmax(-1, keepdim=True), 0.0)
        return torch.where(cold, best, divided)


class TopK(ContinuousBatchingTopKLogitsWarper):
    """The k highest scores; `cuts` says whether a request of the step wants fewer than all."""

    cuts = True

    def fill_defaults(self, int32_tensor: Tensor) -> None:
        int32_tensor.fill_(_count(self.top_k))

    def prepare_tensor_args(self, requests_with_new_token: list[FutureRequestState]) -> Tensor:
        states = [future.state for future in requests_with_new_token]
        counts = [_count(s.logit_processor_kwargs.get("top_k", self.top_k)) for s in states]
        self.cuts = any(count != ALL for count in counts)
        return torch.tensor(counts, dtype=torch.int32)

    def __call__(self, scores: Tensor, tensor_arg: Tensor) -> Tensor:
        if not self.cuts:
            return scores
        return super().__call__(scores, tensor_arg.clamp(max=scores.shape[-1]))


class TopP(ContinuousBatchingTopPLogitsWarper):
    """The likeliest tokens that p holds; `cuts` as in `TopK`."""

    cuts = True

    def prepare_tensor_args(self, requests_with_new_token: list[FutureRequestState]) -> Tensor:
        shares = super().prepare_tensor_args(requests_with_new_token)
        self.cuts = bool((shares.view(torch.float32) < 1).any())
        return shares

    def __call__(self, scores: Tensor, tensor_arg: Tensor) -> Tensor:
        return super().__call__(scores, tensor_arg) if self.cuts else scores


def _count(top_k: int) -> int:
    return min(top_k, ALL) if top_k > 0 else ALL


def asking(config: GenerationConfig) -> GenerationConfig:
    """`config` with values for which transformers makes each of the processors above."""
    changed = copy.deepcopy(config)
    changed.temperature, changed.top_k, changed.top_p = 2.0, 1, 0.5
    return changed


def take_over(processors: ContinuousBatchingLogitsProcessorList, config: GenerationConfig) -> None:
    """Have transformers' processors be those above. Requests that do not say get what `config`
    says."""
    for processor in processors.logits_processor:
        found: Any = processor
        for cls in (Temperature, TopK, TopP):
            if isinstance(found, cls.__bases__):
                found.__class__ = cls
                (name,) = cls.supported_kwargs
                value = getattr(config, name)
                setattr(found, name, UNSAID[name] if value is None else value)


def drawn(processors: ContinuousBatchingLogitsProcessorList) -> bool:
    """Whether a token of the step that is being made is drawn, where the engine draws."""
    found = (p.drawn for p in processors.logits_processor if isinstance(p, Temperature))
    return next(found, True)


# --- what a request may ask for ---


def sampling_number(name: str, value: Any) -> float | None:
    """`value` where it is one that `name` of `RANGES` can have; else None."""
    low, high = RANGES[name]
    number = integer(value) if isinstance(low, int) else _number(value)
    return number if number is not None and low <= number <= high else None


def sampling_range(name: str) -> str:
    """What `name` of `RANGES` can be, as messages say it."""
    low, high = RANGES[name]
    return f"{'an integer' if isinstance(low, int) else 'a number'} from {low:g} to {high:g}"


def checked_sampling(
    processors: ContinuousBatchingLogitsProcessorList, given: Mapping[str, Any]
) -> dict[str, Any]:
    """How a request wants its tokens chosen, without what is None. ConfigError where the engine was
    not started for such an argument, or no token can be chosen with its value."""
    wanted = {name: value for name, value in given.items() if value is not None}
    for name in wanted.keys() & RANGES.keys():
        number = sampling_number(name, wanted[name])
        if number is None:
            raise ConfigError(f"{name} is {sampling_range(name)}; got {wanted[name]!r}")
        wanted[name] = number
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


def integer(value: Any) -> int | None:
    """`value` where it is an integer, of Python, of NumPy or a tensor; else None."""
    try:
        return None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        return None
