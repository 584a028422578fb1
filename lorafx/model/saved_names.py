"""Finds saved names in a model, those of adapters' factors and those of base weights.

    model.layers.0.self_attn.q_proj                      the name in the model, or any alias
    base_model.model.model.layers.0.self_attn.q_proj     PEFT's prefix
    _orig_mod.model.…, module.model.…                    wrappers of torch.compile, DDP, FSDP, PEFT
    layers.0.self_attn.q_proj                            in the model inside one with a head
    model.layers.0.block_sparse_moe.gate                 renamed to …mlp.gate since

Wrappers' names are skipped wherever a module has no child of that name, except at the end: factors
of `q_proj.base_layer` are not those of `q_proj`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from functools import cached_property
from typing import Any, NamedTuple

from torch import nn

from lorafx.errors import nearest
from lorafx.model.module_graph import join

PREFIX = "base_model.model."
COMPILED = "_orig_mod"
#: Names that wrappers put between a module and what they wrap.
WRAPPERS = frozenset(
    {
        COMPILED,
        "module",  # DistributedDataParallel
        "_fsdp_wrapped_module",
        "_checkpoint_wrapped_module",
        "base_layer",  # PEFT's tuner layers
        "original_module",  # PEFT's modules_to_save
    }
)


class Walked(NamedTuple):
    """The last module that a name leads to, its path as it was walked, and the remaining names."""

    module: nn.Module
    path: str
    remaining: tuple[str, ...]

    @property
    def full_path(self) -> str:
        return join(self.path, ".".join(self.remaining)) if self.remaining else self.path


class SavedNames:
    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._has_prefix = PREFIX.partition(".")[0] in self._model._modules
        prefix = getattr(self._model, "base_model_prefix", "")
        self._inner = prefix if isinstance(prefix, str) else ""

    def readings(self, name: str) -> Iterator[str]:
        """Names in the model that `name` may stand for, likeliest first."""
        # Only PEFT's names begin like this, unless the model has such a child itself.
        prefixed = name.startswith(PREFIX) and not self._has_prefix
        readings = dict.fromkeys([] if prefixed else [name])
        plain = _without_wrappers(name)
        for reading in (name, plain):
            while reading.startswith(PREFIX):
                reading = reading.removeprefix(PREFIX)
                readings[reading] = None
        readings[plain] = None
        if self._inner:  # a model may be saved with its task head and loaded without, or vice versa
            for reading in list(readings):
                inner = reading.removeprefix(f"{self._inner}.")
                readings[inner if inner != reading else join(self._inner, reading)] = None
        return iter(readings)

    def renamed(self, name: str) -> str:
        for renaming in self._renamings:
            name = renaming.rename_source_key(name)[0]
        return name

    def walk(self, name: str) -> Walked:
        """Follow `name` through child modules as far as possible."""
        module, path = self._model, ""
        remaining = name.split(".") if name else []
        while remaining:
            children = dict(module._modules.items())  # torch.jit's has no `get`
            child = children.get(remaining[0])
            if child is not None:
                module, path = child, join(path, remaining.pop(0))
                continue
            wrapped = children.get(COMPILED)
            if wrapped is not None:
                module, path = wrapped, join(path, COMPILED)
            elif remaining[0] in WRAPPERS and not WRAPPERS.issuperset(remaining):
                remaining.pop(0)
            else:
                break
        return Walked(module, path, tuple(remaining))

    @cached_property
    def transforms(self) -> list[Any]:
        """transformers' renamings and conversions for checkpoints of the model, in order."""
        transformers = sys.modules.get("transformers")
        if transformers is None:
            return []
        modules = self._model.modules()
        pretrained = next((m for m in modules if isinstance(m, transformers.PreTrainedModel)), None)
        if pretrained is None:
            return []
        from transformers.conversion_mapping import get_model_conversion_mapping

        return list(get_model_conversion_mapping(pretrained))

    @cached_property
    def _renamings(self) -> list[Any]:
        if not self.transforms:
            return []
        from transformers.core_model_loading import WeightRenaming

        return [transform for transform in self.transforms if isinstance(transform, WeightRenaming)]


def without_compiled(path: str) -> str:
    """`path` without the names of torch.compile's wrappers."""
    if COMPILED not in path:
        return path
    return ".".join(part for part in path.split(".") if part != COMPILED)


def _without_wrappers(name: str) -> str:
    parts = name.split(".")
    end = len(parts)
    while end and parts[end - 1] in WRAPPERS:
        end -= 1
    return ".".join([*(part for part in parts[:end] if part not in WRAPPERS), *parts[end:]])


def nearest_names(name: str, known: Iterable[str]) -> str:
    """A message fragment with the names closest to `name`, first among those with its last part."""
    known = list(known)
    last = name.rpartition(".")[2]
    # difflib takes milliseconds for a hundred names.
    same_last = [path for path in known if path.rpartition(".")[2] == last]
    return nearest(name, same_last[:2000]) or nearest(name, known[:1000])
