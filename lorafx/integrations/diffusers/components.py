"""The models of a pipeline that carry LoRA, and the parts of an adapter that are for each.

    unet, transformer, ...            the denoiser
    text_encoder, text_encoder_2, ... encoders of prompts

Which of them may is what diffusers' own loader of the pipeline says (`_lora_loadable_modules`).
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from lorafx.adapter_store.checkpoint import dialect_of
from lorafx.adapter_store.dialects.dialect import DENOISERS
from lorafx.adapter_store.saved import AdapterSource, opened
from lorafx.errors import CaptureError, CheckpointError, ConfigError, LorafxWarning, nearest


def loadable(pipe: Any, components: Iterable[str] | None) -> dict[str, nn.Module]:
    """The models of `pipe` that carry LoRA, by name: `components`, else those that diffusers itself
    loads adapters into. Raises as `compile_pipeline`."""
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
    """Whether this is a model that takes tokens, as transformers' text encoders say they do."""
    return isinstance(module, nn.Module) and getattr(module, "main_input_name", "") == "input_ids"


def loads_adapters(pipeline: type, method: str) -> bool:
    """Whether this is a method of diffusers' loaders of adapters, which change the models."""
    loader = getattr(sys.modules.get("diffusers.loaders.lora_base"), "LoraBaseMixin", None)
    if loader is None:
        return False
    owner = next((cls for cls in pipeline.__mro__ if method in vars(cls)), object)
    return issubclass(owner, loader) and not issubclass(
        owner, sys.modules["diffusers"].DiffusionPipeline
    )


def parts_of(source: Any, pipe: Any, models: Mapping[str, nn.Module]) -> dict[str, AdapterSource]:
    """The part of an adapter that is for each of `models`, of one reading of its files. Warns where
    it has one for a model that the pipeline was loaded without; raises CheckpointError where it has
    one for a model that is not compiled, or that the pipeline does not have."""
    given = source if isinstance(source, AdapterSource) else AdapterSource(source)
    saved = opened(given)
    named = dialect_of(saved, given.dialect).components(saved)
    found: dict[str, AdapterSource] = {}
    for name in named if given.component is None else (given.component,):
        model = _model_of(name, models)
        known = getattr(pipe, "components", {})
        if model is not None and model in found:
            raise CheckpointError(
                f"{saved.where} has factors for {name or 'no model by name'} and "
                f"{found[model].component}, which are both {model} here; say which by "
                "AdapterSource(..., component=...)"
            )
        if model is not None:
            found[model] = replace(given, source=saved, component=name or None)
        elif name in known and known[name] is None:
            warnings.warn(
                f"{saved.where} has factors for {name}, without which the pipeline was loaded; "
                "embeddings that are given have to come from it, with this adapter",
                LorafxWarning,
                stacklevel=3,
            )
        else:
            missing = f"{type(pipe).__name__} does not have"
            why = "is not compiled; name it by components=" if name in known else missing
            raise CheckpointError(
                f"{saved.where} has factors for {name or 'a model that it does not name'}, which "
                f"{why} (compiled: {', '.join(models)})"
            )
    if not found:
        raise CheckpointError(f"{saved.where} has factors for none of {', '.join(models)}")
    return found


def _model_of(name: str, models: Mapping[str, nn.Module]) -> str | None:
    """The model that a file calls so. Files may call every denoiser `unet`, or by no name."""
    if name in models:
        return name
    denoisers = [key for key, module in models.items() if not encodes_prompts(module)]
    if name in (*DENOISERS, "") and len(denoisers) == 1:
        return denoisers[0]
    return next(iter(models)) if not name and len(models) == 1 else None
