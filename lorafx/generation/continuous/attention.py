"""The attention of a model while an engine runs it: sdpa, or eager attention over pages, which here
may be in graphs and knows `softcap`, other than transformers'."""

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
from lorafx.generation.continuous.step_cache import StepCache
from lorafx.progress import LOG
from lorafx.runtime.session import Session

T = TypeVar("T")

#: transformers' name of eager attention over pages.
EAGER = "paged|eager"
#: Models with flash attention that have "sdpa" while an engine runs them.
_SWITCHED: WeakSet[Any] = WeakSet()


def served_attention(model: Any) -> str:
    """The attention that an engine has the model use: "sdpa" or `EAGER`. Raises ConfigError."""
    # transformers' own engine takes such a model, and then each of its steps fails.
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
    """Switches the attention of a session's model for as long as an engine runs it. Calls beside
    the engine have no pages: for their length the model has its former attention."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._model: Any = session.program.model
        self._before: str | None = None

    def take(self) -> None:
        """Have the model use what is served; raises as `served_attention`."""
        model = self._model
        served, before = served_attention(model), model.config._attn_implementation
        if served == before:
            return
        with self._session.lock:
            if served == EAGER:
                self._session.beside = self
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
        """Have the model use what it used before, behind a call that is under way."""
        with self._session.lock:
            before, self._before = self._before, None
            if before is None:
                return
            if self._session.beside is self:
                self._session.beside = None
            _SWITCHED.discard(self._model)
            self._model.set_attn_implementation(before)

    def __call__(self, function: Callable[[], T]) -> T:
        """What `function`, a call beside the engine, returns. The session's lock is held."""
        model = self._model
        if model.config._attn_implementation != EAGER:
            return function()  # inside of such a call, or the engine has ended
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
    """Attention of (1, H, T, D) queries to what the cache holds for them: (1, T, H, D), and the
    weights, where there are any; transformers' own for a cache that is none of ours.

    Raises:
        ConfigError: the model adds a bias by position.
    """
    cache = kwargs.get("cache")
    layer: Any = module.layer_idx
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    if not isinstance(cache, StepCache):
        own: Any = eager_paged_attention_forward
        return own(module, query, key, value, attention_mask, scaling, **kwargs)
    if position_bias is not None:
        raise ConfigError(
            f"{type(module).__name__} cannot compute eager attention over pages: it adds a bias by "
            "position; call generate() for this model, outside continuous batching"
        )
    sinks = getattr(module, "sinks", None)
    by_request = cache.attend(query, key, value, layer, attention_mask, scaling, softcap, sinks)
    if by_request is not None:
        return by_request.transpose(1, 2), None
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
