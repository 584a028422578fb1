"""What a configuration of transformers' engine may ask for where adapters are served."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from transformers.generation.configuration_utils import ContinuousBatchingConfig

from lorafx.errors import ConfigError
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


#: What an engine's configuration may ask for that is not served here, and what it is then.
_OFF: Mapping[str, Any] = {
    "use_cuda_graph": False,
    "use_async_batching": False,
    "varlen_compile_config": None,
    "decode_compile_config": None,
}


def served_config(config: ContinuousBatchingConfig | None) -> ContinuousBatchingConfig:
    """The configuration with what is not served switched off.

    Raises:
        ConfigError: it asks for something of that.
    """
    config = ContinuousBatchingConfig() if config is None else config
    asked = [name for name in _OFF if getattr(config, name) not in (None, False, (False, False))]
    if config.q_padding_interval_size or config.kv_padding_interval_size:
        asked.append("padding intervals (for CUDA graphs)")
    if config.default_compile_level:
        asked.append("default_compile_level")
    if asked:
        raise ConfigError(
            f"the ContinuousBatchingConfig asks for {', '.join(asked)}, which continuous batching "
            "with adapters does not serve: lorafx compiles the model itself. Leave them out"
        )
    scheduler = within_slots(config.scheduler_type)
    return dataclasses.replace(config, **_OFF, auto_switch_to_flash=False, scheduler_type=scheduler)
