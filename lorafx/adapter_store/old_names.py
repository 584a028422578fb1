"""Paths from before modules were renamed: `block_sparse_moe.gate` is `mlp.gate` since.

transformers keeps, for each model, the renamings that its loader applies to checkpoints
(`get_model_conversion_mapping`). Adapters that were trained on the old names are placed by the
same renamings; nothing here knows the name of a model.
"""

from __future__ import annotations

import sys
from typing import Any

from torch import nn

_WEIGHT = ".weight"


class OldNames:
    """The renamings that hold for `model`; none without transformers, or for other models."""

    def __init__(self, model: nn.Module | None) -> None:
        self._model = model
        self._renamings: list[Any] | None = None

    def renamed(self, path: str) -> str | None:
        """What `path` is called now; None where no renaming applies to it.

        Renamings are for the names of weights: a path may become that of a parameter.
        """
        if self._renamings is None:
            self._renamings = _renamings(self._model)
        key = path + _WEIGHT
        for renaming in self._renamings:
            key = renaming.rename_source_key(key)[0]
        new = key.removesuffix(_WEIGHT)
        return None if new == path else new


def _renamings(model: nn.Module | None) -> list[Any]:
    transforms = weight_transforms(model)
    if not transforms:
        return []
    from transformers.core_model_loading import WeightRenaming

    return [transform for transform in transforms if isinstance(transform, WeightRenaming)]


def weight_transforms(model: nn.Module | None) -> list[Any]:
    """What transformers' loader does to checkpoints of `model`: renamings and conversions, in
    order; none without transformers 5, or for other models."""
    transformers = sys.modules.get("transformers")
    if model is None or transformers is None:
        return []
    own = next((m for m in model.modules() if isinstance(m, transformers.PreTrainedModel)), None)
    if own is None:
        return []
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
    except ImportError:  # before transformers 5 nothing was renamed
        return []
    return list(get_model_conversion_mapping(own))
