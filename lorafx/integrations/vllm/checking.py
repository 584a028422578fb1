"""Whether vLLM has read an adapter as lorafx reads it, before any layer gets it.

vLLM leaves out what belongs to no layer, pads factors that are too small with zeros, and takes the
scale from the configuration whatever the factors' rank is. Here each of these is an error.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lorafx.adapter_store.checkpoint import load_state
from lorafx.adapter_store.findings import Problem, check_shape, check_sound
from lorafx.adapter_store.peft_keys import FactorKey, parse, without_prefix
from lorafx.adapter_store.saved import AdapterState
from lorafx.errors import CheckpointError, UnsupportedAdapterError


def check_reading(loaded: Any, folder: str, manager: Any) -> None:
    """Raises CheckpointError with the key of the first tensor in `folder` that vLLM's `loaded` has
    not, has with another scale, or that does not fit its layer in vLLM's `manager`."""
    from vllm.lora.utils import parse_fine_tuned_lora_name

    state = load_state(folder)
    if state.made:
        raise UnsupportedAdapterError(
            f"adapter in {folder} is no LoRA ({next(iter(state.made.values()))!s:.200}), which is "
            "all that vLLM reads; merge it into a copy of the base model"
        )
    mapper = getattr(manager.model, "hf_to_vllm_mapper", None)
    mapper = None if mapper is None else mapper.get_rename_mapper()
    skipped = tuple(getattr(manager.model, "lora_skip_prefixes", None) or ())
    layers = _layers_by_name(manager)
    pairs: dict[str, dict[str, str]] = {}
    try:
        for key, tensor in state.tensors.items():
            factor = parse(key)
            if factor is None:  # the head of a classifier, which vLLM has checked
                continue
            name, _ = parse_fine_tuned_lora_name(key, mapper)
            if any(f".{prefix}" in key or key.startswith(prefix) for prefix in skipped):
                continue
            pairs.setdefault(name, {})[factor.letter] = key
            check_sound(key, tensor)
            _check_layer(name, factor, tensor, layers, manager)
            if factor.letter == "A":
                _check_scale(key, state, factor, tensor, loaded.loras.get(name))
        for keys in pairs.values():
            if keys.keys() != {"A", "B"}:
                raise Problem(f"{next(iter(keys.values()))} has no other factor beside it")
    except Problem as problem:
        raise CheckpointError(f"adapter in {folder}: {problem}") from None


def _layers_by_name(manager: Any) -> Mapping[str, tuple[Any, int | None]]:
    """Each layer with LoRA, and where it is packed, each of its slices by the names of adapters. An
    adapter of the text model may leave out the prefix that a multimodal model has (vLLM 0.33)."""
    found: dict[str, tuple[Any, int | None]] = {}
    for name, layer in manager.modules.items():
        found[name] = found[f"{name}.base_layer"] = (layer, None)
        for part, packed in enumerate(manager.packed_modules.get(name, ())):
            found[packed] = (layer, part)
    text_names = getattr(manager, "_get_text_lora_names", lambda _: ())
    return {text: each for name, each in found.items() for text in text_names(name)} | found


def _check_layer(
    name: str,
    factor: FactorKey,
    tensor: Tensor,
    layers: Mapping[str, tuple[Any, int | None]],
    manager: Any,
) -> None:
    from vllm.lora.layers import FusedMoEWithLoRA, VocabParallelEmbeddingWithLoRA

    layer, part = layers.get(name) or layers.get(f"model.{name}") or (None, None)
    if layer is None:
        if manager.lora_config.target_modules is None:
            raise Problem(f"{factor.key} matches no layer with LoRA of this model in vLLM")
        return  # left out because the user said so
    if isinstance(layer, FusedMoEWithLoRA) or getattr(layer, "tp_size", 1) > 1:
        return  # vLLM compares them with the experts, and slices them
    a, b = layer.lora_a_stacked, layer.lora_b_stacked
    rank = tensor.shape[0 if factor.letter == "A" else -1]
    if isinstance(layer, VocabParallelEmbeddingWithLoRA):
        K, N = a.shape[1], b.shape[2]
    else:
        a, b = (stack if isinstance(stack, tuple) else (stack,) for stack in (a, b))
        sizes = [each.shape[2] for each in b]
        K, N = a[0].shape[3], sum(sizes) if part is None or part >= len(b) else sizes[part]
    shape = (rank, K) if factor.letter == "A" else (N, rank)
    check_shape(factor.key, tensor, shape, f"and the layer in vLLM needs {shape}")


def _check_scale(
    key: str, state: AdapterState, factor: FactorKey, tensor: Tensor, read: Any
) -> None:
    if read is None:
        raise Problem(f"{key} was left out by vLLM")
    path, rank = without_prefix(factor.module), tensor.shape[0]
    name = state.config.name_of(path)
    configured, scale = state.config.rank(name), state.config.scale(name, rank)
    if configured not in (None, rank):
        raise Problem(
            f"{key} has rank {rank}, and adapter_config.json says {configured} (r, rank_pattern); "
            "correct the configuration, which decides the scale"
        )
    if not math.isclose(scale, read.scaling, rel_tol=1e-6):
        raise Problem(
            f"{key} has scale {scale:g} by adapter_config.json, and vLLM reads {read.scaling:g}"
        )
