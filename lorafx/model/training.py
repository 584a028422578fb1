"""A warning for a model in training mode, whose dropout changes every answer."""

from __future__ import annotations

import warnings

from torch import nn

from lorafx.errors import LorafxWarning


def warn_training(model: nn.Module, stacklevel: int) -> None:
    warnings.warn(
        f"{type(model).__name__} is in training mode, so its dropout is active; call eval() for "
        "inference",
        LorafxWarning,
        stacklevel=stacklevel + 1,
    )
