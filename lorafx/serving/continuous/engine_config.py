"""What a configuration of transformers' engine may ask for where adapters are served."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from weakref import WeakSet

import torch
from transformers.generation.configuration_utils import ContinuousBatchingConfig
from transformers.utils.generic import is_flash_attention_requested

from lorafx.errors import ConfigError
from lorafx.progress import LOG
from lorafx.serving.continuous.eager import EAGER
from lorafx.serving.continuous.scheduling import within_slots
from lorafx.torch_internals.transformers_parts import devices_of_async_batching


@contextmanager
def possible(model: Any) -> Iterator[None]:
    """Around what transformers makes for its engine.

    Raises:
        ConfigError: it cannot, for this model or with these sizes.
    """
    try:
        yield
    except ValueError as error:
        raise ConfigError(
            f"transformers' engine cannot make a paged cache for {type(model).__name__}: {error}. "
            "Change the ContinuousBatchingConfig if it is about sizes; otherwise call generate()"
        ) from error


#: What an engine's configuration may ask for that is not served here, and why.
_REFUSED: Mapping[str, str] = {
    "use_cuda_graph": (
        "a replayed graph runs nothing on the host, where the slot of each token is written and "
        "mixes are refused"
    ),
    "varlen_compile_config": "lorafx compiles the model itself",
    "decode_compile_config": "lorafx compiles the model itself",
    "default_compile_level": "lorafx compiles the model itself",
    "q_padding_interval_size": "only CUDA graphs and compilation by the engine pad",
    "kv_padding_interval_size": "only CUDA graphs and compilation by the engine pad",
}


def served_config(
    config: ContinuousBatchingConfig | None, device: torch.device
) -> ContinuousBatchingConfig:
    """The configuration with what is not served switched off.

    Raises:
        ConfigError: it asks for something of that, or for what this device cannot do.
    """
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


#: Models that have another attention while an engine runs them than flash attention.
_SWITCHED: WeakSet[Any] = WeakSet()


def served_attention(model: Any) -> str:
    """The attention that an engine has the model use: "sdpa" or "eager", which is the model's own,
    or "sdpa" where that is flash attention.

    Raises:
        ConfigError: its rows are not followed over pages, or another engine runs the model; or the
            model computes attention by itself, not by transformers' attention functions.
    """
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
    if is_flash_attention_requested(requested_attention_implementation=name):
        if model._supports_sdpa and model._can_set_attn_implementation():
            return "sdpa"
    elif name in ("eager", "sdpa"):
        return str(name)
    raise ConfigError(
        f"{type(model).__name__} uses the attention {name!r}, whose rows are not followed "
        'over a paged cache; continuous batching with adapters serves "sdpa" and "eager". '
        'Call model.set_attn_implementation("sdpa") before lorafx.compile'
    )


class OwnAttention:
    """The attention of `model` while an engine runs it, where that is another than before."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._before: str | None = None

    def take(self) -> None:
        """Have the model use what is served.

        Raises:
            ConfigError: as `served_attention`.
        """
        model, served = self._model, served_attention(self._model)
        before = model.config._attn_implementation
        if served == before:
            return
        LOG.warning(
            "%s uses the attention %r, whose kernels take the keys of all requests by lengths and "
            "write into the cache by themselves; while the engine runs it uses %r, and %r after "
            "that",
            *(type(model).__name__, before, served, before),
        )
        model.set_attn_implementation(served)
        self._before = before
        _SWITCHED.add(model)

    def give_back(self) -> None:
        """Have the model use what it used before; nothing where that was done."""
        before, self._before = self._before, None
        if before is not None:
            _SWITCHED.discard(self._model)
            self._model.set_attn_implementation(before)
