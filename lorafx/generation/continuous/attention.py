"""The attention of a model while an engine runs it.

It is sdpa, or eager attention over pages, which unlike that of transformers can be in graphs and
supports `softcap`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar
from weakref import WeakSet

import torch
from torch import Tensor, nn
from transformers.integrations.eager_paged import eager_paged_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils.generic import is_flash_attention_requested

from lorafx.errors import ConfigError
from lorafx.generation.continuous.pages import StepCache
from lorafx.progress import LOG
from lorafx.runtime.session import Session

T = TypeVar("T")

#: Types of devices on which it runs without synchronization; "cuda" includes ROCm.
ATTENDING_DEVICES = ("cpu", "cuda")

#: transformers' name of eager attention over pages.
EAGER = "paged|eager"
#: Models with flash attention that use "sdpa" while an engine runs them.
_SWITCHED: WeakSet[Any] = WeakSet()


def served_attention(model: Any) -> str:
    """The attention that the model uses while an engine runs it: "sdpa" or `EAGER`. Raises
    ConfigError if it can use neither, or if another engine has switched its attention."""
    # transformers' own engine accepts such a model, but each of its steps fails.
    if not (model._supports_attention_backend or model._can_set_attn_implementation()):
        raise ConfigError(
            f"{type(model).__name__} computes attention by itself, not by transformers' attention "
            "functions, so it cannot read a paged cache; call generate() for this model"
        )
    name = model.config._attn_implementation
    if name == EAGER or model in _SWITCHED:
        kind = "eager" if name == EAGER else "flash"
        raise ConfigError(
            f"{type(model).__name__} uses the attention {name!r}, as it does while an engine "
            f"runs it: one engine at a time serves a model with {kind} attention. End that one "
            'first, or call model.set_attn_implementation("sdpa") before lorafx.compile'
        )
    if name in ("eager", "sdpa"):
        return EAGER if name == "eager" else "sdpa"
    flash = is_flash_attention_requested(requested_attention_implementation=name)
    if flash and model._supports_sdpa and model._can_set_attn_implementation():
        return "sdpa"
    raise ConfigError(
        f"{type(model).__name__} uses the attention {name!r}, whose rows are not followed "
        'over a paged cache; continuous batching with adapters serves "sdpa" and "eager". '
        'Call model.set_attn_implementation("sdpa") before lorafx.compile'
    )


class EngineAttention:
    """Switches the attention of a session's model while an engine runs it. Other calls have no
    pages: during such a call the model has its former attention."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._model: Any = session.program.model
        self._before: str | None = None

    def take(self) -> None:
        """Switch to the attention that is served. Raises what `served_attention` raises."""
        model = self._model
        served, before = served_attention(model), model.config._attn_implementation
        if served == before:
            return
        with self._session.lock:
            if served == EAGER:
                self._session.outside_engine = self
            else:
                _SWITCHED.add(model)
                LOG.warning(
                    "%s uses the attention %r, whose kernels take the keys of all requests by "
                    "lengths and write into the cache by themselves; while the engine runs it uses "
                    "%r, and %r after that",
                    *(type(model).__name__, before, served, before),
                )
            model.set_attn_implementation(served)
            self._before = before

    def give_back(self) -> None:
        """Switch to the former attention, after the running call."""
        with self._session.lock:
            before, self._before = self._before, None
            if before is None:
                return
            if self._session.outside_engine is self:
                self._session.outside_engine = None
            _SWITCHED.discard(self._model)
            self._model.set_attn_implementation(before)

    def __call__(self, function: Callable[[], T]) -> T:
        """Run `function`, a call outside the engine. The caller holds the session's lock."""
        model = self._model
        if model.config._attn_implementation != EAGER:
            return function()  # a nested call, or the engine has ended
        model.set_attn_implementation(self._before)
        try:
            return function()
        finally:
            model.set_attn_implementation(EAGER)


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
    """Attention of queries (1, H, T, D) to the keys and values in the cache: (1, T, H, D), and the
    weights, or None if they are not computed. For a cache that is no StepCache it is transformers'.

    Raises:
        ConfigError: the model adds a bias by position.
    """
    cache = kwargs.get("cache")
    layer: Any = module.layer_idx
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    if not isinstance(cache, StepCache):
        forward: Any = eager_paged_attention_forward
        return forward(module, query, key, value, attention_mask, scaling, **kwargs)
    if position_bias is not None:
        raise ConfigError(
            f"{type(module).__name__} cannot compute eager attention over pages: it adds a bias by "
            "position; call generate() for this model, outside continuous batching"
        )
    sinks = getattr(module, "sinks", None)
    output = cache.attend(query, key, value, layer, attention_mask, scaling, softcap, sinks)
    if output is not None:
        return output.transpose(1, 2), None
    key, value = cache.update(key, value, layer, kwargs)
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


ALL_ATTENTION_FUNCTIONS.register(EAGER, eager_attention)
