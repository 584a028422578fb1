"""The models of a pipeline that can carry adapters, and which part of a file each gets."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from lorafx.adapter_store.checkpoint import components as components_of
from lorafx.adapter_store.dialects.spelling import DENOISERS
from lorafx.adapter_store.saved import AdapterSource, read_source
from lorafx.errors import (
    CaptureError,
    CheckpointError,
    ConfigError,
    LorafxWarning,
    nearest,
)
from lorafx.libraries import class_of_library


def loadable(pipe: Any, components: Iterable[str] | None) -> dict[str, nn.Module]:
    """The models of `pipe` that carry LoRA, by name: `components`, or by default those into which
    diffusers loads adapters. Raises ConfigError and CaptureError as `compile_pipeline` does."""
    if not isinstance(getattr(pipe, "components", None), Mapping) or isinstance(pipe, nn.Module):
        raise ConfigError(
            f"{type(pipe).__name__} is no pipeline of diffusers, which has `components`; compile "
            "a single model with lorafx.compile"
        )
    models = {name: m for name, m in pipe.components.items() if isinstance(m, nn.Module)}
    known = [name for name in getattr(pipe, "_lora_loadable_modules", ()) if name in models]
    names = known if components is None else list(dict.fromkeys(components))
    if not names:
        why = f"diffusers loads no adapters into {type(pipe).__name__}"
        raise ConfigError(
            f"{why if components is None else 'components=() names no model'}; name the models "
            f"that carry LoRA by components=... (it has {', '.join(models)})"
        )
    for name in names:
        if name not in models:
            raise ConfigError(
                f"{type(pipe).__name__} has no model {name!r}{nearest(str(name), models)}; it "
                f"has {', '.join(models)}"
            )
        if any(hasattr(module, "_hf_hook") for module in models[name].modules()):
            raise CaptureError(
                f"{name} is moved between devices by accelerate's hooks, and banks are not; move "
                "the pipeline to one device (pipe.remove_all_hooks(), pipe.to(device))"
            )
    return {name: models[name] for name in names}


def encodes_prompts(module: object) -> bool:
    """Whether `module` declares token ids as its main input, as transformers' text encoders do."""
    return isinstance(module, nn.Module) and getattr(module, "main_input_name", "") == "input_ids"


def loads_adapters(pipeline: type, method: str) -> bool:
    """Whether `method` is defined by diffusers' loaders of adapters, which change the models."""
    loader = class_of_library("diffusers.loaders.lora_base", "LoraBaseMixin")
    if loader is None:
        return False
    owner = next((cls for cls in pipeline.__mro__ if method in vars(cls)), object)
    return issubclass(owner, loader) and not issubclass(
        owner, sys.modules["diffusers"].DiffusionPipeline
    )


def parts_of(source: Any, pipe: Any, models: Mapping[str, nn.Module]) -> dict[str, AdapterSource]:
    """The part of an adapter for each of `models`, by the model's name. Its files are read once.
    Warns if it has a part for a model that the pipeline was loaded without. Raises CheckpointError
    if it has a part for a model that is not compiled, or that the pipeline does not have."""
    adapter = source if isinstance(source, AdapterSource) else AdapterSource(source)
    saved = read_source(adapter)
    in_files = components_of(saved, adapter.dialect)
    components = getattr(pipe, "components", {})
    parts: dict[str, AdapterSource] = {}
    for name in in_files if adapter.component is None else (adapter.component,):
        model = _model_of_component(name, models)
        if model is not None and model in parts:
            raise CheckpointError(
                f"{saved.where} has factors for {name or 'no model by name'} and "
                f"{parts[model].component}, which are both {model} here; say which by "
                "AdapterSource(..., component=...)"
            )
        if model is not None:
            parts[model] = replace(adapter, source=saved, component=name or None)
        elif name in components and components[name] is None:
            warnings.warn(
                f"{saved.where} has factors for {name}, without which the pipeline was loaded; "
                "precomputed embeddings have to come from it, with this adapter",
                LorafxWarning,
                stacklevel=3,
            )
        else:
            missing = f"{type(pipe).__name__} does not have"
            why = "is not compiled; name it by components=" if name in components else missing
            raise CheckpointError(
                f"{saved.where} has factors for {name or 'a model that it does not name'}, which "
                f"{why} (compiled: {', '.join(models)})"
            )
    if not parts:
        raise CheckpointError(f"{saved.where} has factors for none of {', '.join(models)}")
    return parts


def _model_of_component(name: str, models: Mapping[str, nn.Module]) -> str | None:
    """The model that a file means by `name`; files may call any denoiser `unet`, or ""."""
    if name in models:
        return name
    denoisers = [key for key, module in models.items() if not encodes_prompts(module)]
    if name in (*DENOISERS, "") and len(denoisers) == 1:
        return denoisers[0]
    return next(iter(models)) if not name and len(models) == 1 else None
