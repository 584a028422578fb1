"""What a configuration of transformers' engine may ask for where adapters are served."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from transformers.generation.configuration_utils import ContinuousBatchingConfig
from transformers.generation.continuous_batching.input_outputs import ContinuousBatchingAsyncIOs

from lorafx.errors import ConfigError
from lorafx.serving.continuous.eager import EAGER
from lorafx.serving.continuous.scheduling import within_slots


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
    able = ContinuousBatchingAsyncIOs._supported_device_types
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


def check_attention(model: Any) -> None:
    """Look at the attention that the model uses, before transformers has it read pages.

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
    if name == EAGER:
        raise ConfigError(
            f"{type(model).__name__} uses the attention {name!r}, as it does while an engine "
            "runs it: one engine at a time serves a model with eager attention. End that one "
            'first, or call model.set_attn_implementation("sdpa") before lorafx.compile'
        )
    if name not in ("eager", "sdpa"):
        raise ConfigError(
            f"{type(model).__name__} uses the attention {name!r}, whose rows are not followed "
            'over a paged cache; continuous batching with adapters serves "sdpa" and "eager". '
            'Call model.set_attn_implementation("sdpa") before lorafx.compile'
        )
