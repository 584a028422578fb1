"""Eager attention over pages.

transformers' own is kept out of graphs, for the sake of a cache that is not used here, and leaves
out what some models ask of their eager attention (`softcap`).

Calls of a model beside an engine that has it use eager attention over pages.

transformers switches a model with eager attention to one over pages for as long as an engine runs
it. Another call has no pages, and not even a mask for this attention. Calls take turns with steps,
so the model has its own attention for the length of a call.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from lorafx.errors import ConfigError
from lorafx.session.session import Session

T = TypeVar("T")


class BesideEngine:
    """Has the calls of one model, `session`'s, use the attention `own` while an engine runs."""

    def __init__(self, session: Session, own: str) -> None:
        self._session, self._own = session, own
        self._model: Any = session.program.model
        with session.lock:
            session.beside = self

    def __call__(self, function: Callable[[], T]) -> T:
        """What `function` returns. The session's lock is held."""
        if self._model.config._attn_implementation != EAGER:
            return function()  # inside of such a call, or the engine has ended
        self._model.set_attn_implementation(self._own)
        try:
            return function()
        finally:
            self._model.set_attn_implementation(EAGER)

    def end(self) -> None:
        """The engine has ended, or never ran: the model has its own attention again."""
        with self._session.lock:  # behind a call that is under way
            self._session.beside = None
            if self._model.config._attn_implementation == EAGER:
                self._model.set_attn_implementation(self._own)


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
