"""Eager attention over pages.

transformers' own is kept out of graphs, for the sake of a cache that is not used here, and leaves
out what some models ask of their eager attention (`softcap`).
"""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from lorafx.errors import ConfigError

#: transformers' name of the eager attention over pages.
EAGER = "paged|eager"


def eager_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    position_bias: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention of (1, H, T, D) queries to what the cache holds for them: (1, T, H, D), and the
    weights, where there are any.

    Raises:
        ConfigError: the model adds a bias by position, which knows of no pages; or it is called
            outside the engine.
    """
    cache = kwargs.pop("cache", None)
    if cache is None or position_bias is not None:
        raise ConfigError(
            f"{type(module).__name__} cannot compute eager attention over pages: "
            + ("it adds a bias by position" if cache is not None else "there is no paged cache")
            + "; call generate() for this model, outside continuous batching"
        )
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    sinks = getattr(module, "sinks", None)
    by_request = cache.attend(
        query, key, value, module.layer_idx, attention_mask, scaling, softcap, sinks
    )
    if by_request is not None:
        return by_request.transpose(1, 2), None
    key, value = cache.update(key, value, module.layer_idx, kwargs)
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = torch.matmul(query, key.transpose(2, 3)) * scaling
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if attention_mask is not None:
        scores = scores + attention_mask
    if sinks is not None:
        scores = torch.cat([scores, sinks.view(1, -1, 1, 1).expand(1, -1, scores.shape[2], 1)], -1)
    weights = scores.softmax(-1, dtype=torch.float32).to(query.dtype)
    if sinks is not None:
        weights = weights[..., :-1]
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights


class TracedEager:
    """In blocks of it `eager_attention` stands in transformers' registry. Engines of several models
    may be in such blocks at once."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0

    def __enter__(self) -> None:
        functions: Any = ALL_ATTENTION_FUNCTIONS
        with self._lock:
            if not self._inside:
                functions[EAGER] = eager_attention
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        functions: Any = ALL_ATTENTION_FUNCTIONS
        with self._lock:
            self._inside -= 1
            if not self._inside:
                del functions[EAGER]
