"""Files of kohya's sd-scripts and of A1111: paths with underscores in place of dots.

    lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight   A
    ….lora_up.weight   B;   ….alpha   α, s = α/r, or 1 if it is absent;   ….dora_scale   m

Names are resolved by flattening the model's; ambiguous names are refused. They become diffusers'
names, `unet.<module>.lora_A.weight`. Unknown names go to diffusers' conversion: many files use the
names of a model's first implementation.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor, nn

from lorafx.adapter_store.dialects import diffusers
from lorafx.adapter_store.dialects.dialect import alpha_of
from lorafx.adapter_store.peft_keys import factor_sizes
from lorafx.adapter_store.saved import AdapterState, Saved
from lorafx.errors import CheckpointError, UnsupportedAdapterError, nearest
from lorafx.model.module_graph import join
from lorafx.model.saved_names import without_compiled

KEYS = "lora_unet_<module with underscores>.lora_down.weight"
_FACTORS = {
    "lora_down.weight": "lora_A.weight",
    "lora_up.weight": "lora_B.weight",
    "lora_A.weight": "lora_A.weight",
    "lora_B.weight": "lora_B.weight",
    "dora_scale": "lora_magnitude_vector",
    "alpha": "alpha",
}
#: Components in files -> components of pipelines.
_COMPONENTS: Mapping[str, str] = {
    "lora_unet": "unet",
    "lora_transformer": "transformer",
    "lora_te": "text_encoder",
    "lora_te1": "text_encoder",
    "lora_te2": "text_encoder_2",
    "lora_te3": "text_encoder_3",
    "lora_prior_unet": "prior",
    "lora_prior_te": "text_encoder",
}
_PREFIX = re.compile(rf"({'|'.join(sorted(_COMPONENTS, key=len, reverse=True))})_")


def claims(saved: Saved) -> bool:
    return any(_PREFIX.match(key) and _is_key(key) for key in saved.tensors)


def components(saved: Saved) -> tuple[str, ...]:
    return tuple(dict.fromkeys(map(_component_of, saved.tensors)))


def _component_of(key: str) -> str:
    match = _PREFIX.match(key)
    return _COMPONENTS[match[1]] if match else ""


def state(saved: Saved, model: nn.Module | None) -> AdapterState:
    for key in saved.tensors:
        if not _is_key(key):
            raise CheckpointError(
                f"{saved.where} has keys that are not kohya's (such as {key[:200]!r}): "
                f"{KEYS}, .lora_up.weight, .alpha, .dora_scale"
            )
    names = dict.fromkeys(key.partition(".")[0] for key in saved.tensors)
    flat = {} if model is None else _flattened(model)
    paths = {name: name if model is None else _path(saved, name, flat) for name in names}
    values: dict[str, Tensor | float] = {}
    for key, tensor in saved.tensors.items():
        name, _, factor = key.partition(".")
        if factor == "alpha":
            values[f"{paths[name]}.alpha"] = alpha_of(f"{saved.where}: {key}", tensor)
            continue
        if factor == "dora_scale" and tensor.dim() > 1 and tensor.numel() != len(tensor):
            raise UnsupportedAdapterError(
                f"{saved.where}: {key} has shape {tuple(tensor.shape)}, a scale for each "
                "input; DoRA here scales outputs (train with wd_on_output), or merge it into a "
                "copy of the base model"
            )
        target = f"{paths[name]}.{_FACTORS[factor]}"
        if target in values:
            raise CheckpointError(f"{saved.where} has two keys that mean {target}; keep one")
        values[target] = tensor
    adapter = diffusers.translated(saved, "kohya", values, model, _component_of)
    lost = [path for path in factor_sizes(adapter.tensors) if "." not in path and path not in flat]
    if model is not None and lost:
        lines = "; ".join(f"{path}{nearest(path, list(flat)[:1000], 1)}" for path in lost[:3])
        raise CheckpointError(
            f"{saved.where} (kohya): {len(lost)} of its {len(names)} names are of no module of "
            "this model, and diffusers, where it is installed, has no conversion for it: "
            f"{lines}"
        )
    return adapter


def _is_key(key: str) -> bool:
    name, _, factor = key.partition(".")
    return bool(name) and factor in _FACTORS


def _flattened(model: nn.Module) -> dict[str, list[str]]:
    """Module paths by their flattened forms."""
    paths: dict[str, list[str]] = {}
    for name, module in model.named_modules():
        if name and module._parameters:
            path = without_compiled(name)
            paths.setdefault(path.replace(".", "_"), []).append(path)
    return paths


def _path(saved: Saved, name: str, flat: Mapping[str, list[str]]) -> str:
    """`unet.<module>` for a name. The model may be the whole pipeline, or lack a wrapper with which
    the name begins (`text_model` of CLIP in transformers 5). Unknown names keep underscores."""
    match, component = _PREFIX.match(name), _component_of(name)
    flat_name = name[match.end() :] if match else name
    if f"{component}_{flat_name}" in flat:
        return _single(saved, name, flat[f"{component}_{flat_name}"])
    for cut in range(3):
        inner = flat_name.split("_", cut)[-1]
        if inner in flat:
            wrapper = flat_name.removesuffix(inner).removesuffix("_")
            return join(component, join(wrapper, _single(saved, name, flat[inner])))
    return join(component, flat_name)


def _single(saved: Saved, name: str, paths: list[str]) -> str:
    if len(paths) > 1:
        raise CheckpointError(
            f"{saved.where}: {name} may be {' or '.join(paths)}, which are spelt alike without "
            "dots; save the adapter in another dialect (diffusers, PEFT)"
        )
    return paths[0]
