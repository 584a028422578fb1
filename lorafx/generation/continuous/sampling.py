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

from lorafx.generation.continuous.request_checks import UNSAID

#: Lower temperatures take the likeliest token. It is vLLM's bound.
COLDEST = 1e-5
#: top_k of a request that leaves all tokens.
ALL = torch.iinfo(torch.int32).max


class Temperature(ContinuousBatchingTemperatureLogitsWarper):
    """scores / temperature; at 0 nothing but the first of the highest scores is left.

    Attributes:
        drawn: whether a token of the step is drawn; otherwise each is the likeliest.
        likeliest: whether a token of the step is the likeliest.
        taken: the rows of the step whose tokens are the likeliest, (rows, 1) bool, and the scores
            (rows, vocabulary) of all; None where there are none.
    """

    drawn = likeliest = True
    taken: tuple[Tensor, Tensor] | None = None

    def prepare_tensor_args(self, requests_with_new_token: list[FutureRequestState]) -> Tensor:
        given = super().prepare_tensor_args(requests_with_new_token).view(torch.float32)
        cold = given < COLDEST
        self.likeliest, self.drawn = bool(cold.any()), not bool(cold.all())
        return given.masked_fill(cold, 0.0).view(torch.int32)

    def __call__(self, scores: Tensor, tensor_arg: Tensor) -> Tensor:
        # Rows behind those of the requests with a new token have the temperatures of earlier steps.
        temperatures = tensor_arg[: scores.shape[0]].view(torch.float32)[:, None]
        cold = temperatures == 0
        self.taken = (cold, scores) if self.likeliest else None
        if not self.drawn:
            return scores
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


def _temperature(processors: ContinuousBatchingLogitsProcessorList) -> Temperature | None:
    found = (p for p in processors.logits_processor if isinstance(p, Temperature))
    return next(found, None)


def drawn(processors: ContinuousBatchingLogitsProcessorList) -> bool:
    """Whether a token of the step that is being made is drawn, where the engine draws."""
    temperature = _temperature(processors)
    return temperature is None or temperature.drawn


def likely_as_alone(runner: Any, processors: ContinuousBatchingLogitsProcessorList) -> None:
    """Have the log probability of a token that is the likeliest be that of the model's own logits,
    as of an engine that never draws. Beside requests that draw, it would be certain to be drawn."""
    temperature, sample = _temperature(processors), runner._sample
    if temperature is None or not runner.return_logprobs:
        return

    def sampled(scores: Tensor, output_ids: Tensor) -> None:
        sample(scores, output_ids)
        if temperature.taken is None:
            return
        (cold, logits), rows = temperature.taken, slice(scores.shape[1])
        tokens = output_ids[0, rows, None].long()
        likely = logits.log_softmax(-1).gather(-1, tokens)[:, 0].view(torch.int32)
        output_ids[1, rows] = torch.where(cold[:, 0], likely, output_ids[1, rows])

    runner._sample = sampled
