"""How each request's tokens are chosen: transformers' processors of logits, with values per request
of which some switch a processor off.

    temperature  0 (below `COLDEST`) takes the likeliest token, as without sampling
    top_k        0, -1 and numbers above the vocabulary's size keep all tokens
    top_p        1 keeps all tokens

All processors exist, whatever the engine's own values are. A step skips those that no request uses.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

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

#: The values that processors read if neither the request nor the engine has one.
DEFAULTS: Mapping[str, float] = {"temperature": 1.0, "top_k": 0, "top_p": 1.0}
#: Lower temperatures take the likeliest token. vLLM has the same bound.
COLDEST = 1e-5
#: The top_k that keeps all tokens.
ALL = torch.iinfo(torch.int32).max


class Temperature(ContinuousBatchingTemperatureLogitsWarper):
    """scores / temperature; at 0 only the first of the highest scores is kept.

    Attributes:
        drawn: whether any token of the step is drawn.
        likeliest: whether any token of the step is the likeliest one, without drawing.
    """

    drawn = likeliest = True

    def prepare_tensor_args(self, requests_with_new_token: list[FutureRequestState]) -> Tensor:
        temperatures = super().prepare_tensor_args(requests_with_new_token).view(torch.float32)
        cold = temperatures < COLDEST
        self.likeliest, self.drawn = bool(cold.any()), not bool(cold.all())
        return temperatures.masked_fill(cold, 0.0).view(torch.int32)

    def __call__(self, scores: Tensor, tensor_arg: Tensor) -> Tensor:
        if not self.drawn:
            return scores
        # Rows after those of the requests with a new token have temperatures of earlier steps.
        temperatures = tensor_arg[: scores.shape[0]].view(torch.float32)[:, None]
        cold = temperatures == 0
        divided = scores / temperatures.masked_fill(cold, 1.0)
        if not self.likeliest:
            return divided
        best = torch.full_like(scores, -torch.inf)
        best.scatter_(-1, scores.argmax(-1, keepdim=True), 0.0)
        return torch.where(cold, best, divided)


class TopK(ContinuousBatchingTopKLogitsWarper):
    """Keeps the k highest scores. `cuts`: whether a request of the step keeps fewer than all."""

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
    """Keeps the likeliest tokens, of probability p together. `cuts` as in `TopK`."""

    cuts = True

    def prepare_tensor_args(self, requests_with_new_token: list[FutureRequestState]) -> Tensor:
        shares = super().prepare_tensor_args(requests_with_new_token)
        self.cuts = bool((shares.view(torch.float32) < 1).any())
        return shares

    def __call__(self, scores: Tensor, tensor_arg: Tensor) -> Tensor:
        return super().__call__(scores, tensor_arg) if self.cuts else scores


def _count(top_k: int) -> int:
    return min(top_k, ALL) if top_k > 0 else ALL


def enabling(config: GenerationConfig) -> GenerationConfig:
    """`config` with values for which transformers makes each of the processors above."""
    changed = copy.deepcopy(config)
    changed.temperature, changed.top_k, changed.top_p = 2.0, 1, 0.5
    return changed


def replace_in(processors: ContinuousBatchingLogitsProcessorList, config: GenerationConfig) -> None:
    """Turn transformers' processors into those above. `config` has the defaults of requests."""
    for processor in processors.logits_processor:
        replaced: Any = processor
        for cls in (Temperature, TopK, TopP):
            if isinstance(replaced, cls.__bases__):
                replaced.__class__ = cls
                (name,) = cls.supported_kwargs
                value = getattr(config, name)
                setattr(replaced, name, DEFAULTS[name] if value is None else value)


def any_drawn(processors: ContinuousBatchingLogitsProcessorList) -> bool:
    """Whether any token of the coming step is drawn, for an engine that samples."""
    drawn = (p.drawn for p in processors.logits_processor if isinstance(p, Temperature))
    return next(drawn, True)
