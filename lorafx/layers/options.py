"""What the constructors of all layers take beside sizes, and what they make of it first."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypedDict

import torch

from lorafx.errors import ConfigError
from lorafx.layers.parallel import TensorParallel
from lorafx.layers.quantization import QuantizeMethodBase

if TYPE_CHECKING:
    import torch.distributed as dist


class LayerOptions(TypedDict, total=False):
    """Keyword arguments that all layers take."""

    params_dtype: torch.dtype | None
    device: torch.device | str | None
    quant_method: QuantizeMethodBase | None
    prefix: str
    tp_group: dist.ProcessGroup | None
    disable_tp: bool


def label_of(layer: object, options: LayerOptions) -> str:
    """What messages call a layer that is being made."""
    prefix, name = options.get("prefix"), type(layer).__name__
    return f"{prefix} ({name})" if prefix else name


def group_of(options: LayerOptions) -> TensorParallel:
    """The tensor-parallel group of a layer."""
    if options.get("disable_tp", False):
        return TensorParallel()
    return TensorParallel.of(options.get("tp_group"))


def checked_sizes(layer: str, **sizes: int) -> None:
    """Sizes are positive integers.

    Raises:
        ConfigError: one is not.
    """
    for name, size in sizes.items():
        if not isinstance(size, int) or isinstance(size, bool) or size <= 0:
            raise ConfigError(f"{layer}: {name} must be a positive integer, got {size!r}")
