"""Files of kohya's sd-scripts and of A1111: paths with underscores for dots.

    lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight   A
    ….lora_up.weight   B;   ….alpha   α, s = α/r, and 1 where it is absent;   ….dora_scale   m

Names are resolved by flattening the model's; ambiguous names are refused. Unknown names go to
diffusers' conversion: many files use the names of a model's first implementation.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from lorafx.adapter_store.dialects.dialect import Dialect, Translation, alpha_of, component_of
from lorafx.adapter_store.dialects.diffusers import converted_by_diffusers
from lorafx.adapter_store.peft_config import PeftConfig
from lorafx.adapter_store.saved import AdapterState, Saved
from lorafx.errors import CheckpointError, UnsupportedAdapterError, nearest
from lorafx.model.saved_names import without_compiled

_LETTERS = {
    "lora_down.weight": "A",
    "lora_up.weight": "B",
    "lora_A.weight": "A",
    "lora_B.weight": "B",
    "dora_scale": "m",
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
#: Module paths by their flattened forms.
_Flat = Mapping[str, tuple[str, ...]]


class Kohya(Dialect):
    """lora_unet_<path with underscores>.lora_down.weight, .lora_up.weight, .alpha."""

    name = "kohya"
    keys = "lora_unet_<module with underscores>.lora_down.weight"

    def claims(self, saved: Saved) -> bool:
        return any(_PREFIX.match(key) and _is_key(key) for key in saved.tensors)

    def state(self, saved: Saved, model: nn.Module | None) -> AdapterState:
        modules: dict[str, dict[str, Tensor]] = {}
        for key, tensor in saved.tensors.items():
            if not _is_key(key):
                raise CheckpointError(
                    f"{saved.where} has keys that are not kohya's (such as {key[:200]!r}): "
                    f"{self.keys}, .lora_up.weight, .alpha, .dora_scale"
                )
            name, _, factor = key.partition(".")
            modules.setdefault(name, {})[factor] = tensor
        found = Translation(saved, self, model)
        if model is None:
            paths = {name: name for name in modules}
        else:
            flat = _flattened(model)
            names, found.left_out = _of_this_model(modules, saved, flat)
            names = _unwrapped(names, flat)
            lost = [name for name, rest in names.items() if rest not in flat]
            if lost:
                converted = converted_by_diffusers(saved, self, model)
                if converted is not None:
                    return converted
                known = list(flat)[:1000]
                lines = "; ".join(f"{name}{nearest(names[name], known, 1)}" for name in lost[:3])
                raise CheckpointError(
                    f"{saved.where} (kohya): {len(lost)} of its {len(names)} names are of no "
                    "module of this model, and diffusers, where it is installed, has no "
                    f"conversion for it: {lines}"
                )
            paths = {name: _only(saved, name, flat[rest]) for name, rest in names.items()}
        for name, path in paths.items():
            _place(found, path, name, modules[name])
        dora = any(path.endswith("lora_magnitude_vector") for path in found.tensors)
        return found.state(PeftConfig(use_dora=dora))

    def components(self, saved: Saved) -> tuple[str, ...]:
        matches = map(_PREFIX.match, saved.tensors)
        return tuple(dict.fromkeys(_COMPONENTS[m[1]] if m else "" for m in matches))


def _is_key(key: str) -> bool:
    name, _, factor = key.partition(".")
    return bool(name) and (factor == "alpha" or factor in _LETTERS)


def _flattened(model: nn.Module) -> _Flat:
    found: dict[str, dict[str, None]] = {}
    for name, module in model.named_modules():
        if name and module._parameters:
            path = without_compiled(name)
            found.setdefault(path.replace(".", "_"), {})[path] = None
    return {name: tuple(paths) for name, paths in found.items()}


def _of_this_model(
    names: Iterable[str], saved: Saved, flat: _Flat
) -> tuple[dict[str, str], tuple[str, ...]]:
    """The file's names for this model's modules, and the components of other names."""
    groups: dict[str, dict[str, str]] = {}
    held: dict[str, str] = {}
    for name in names:
        match = _PREFIX.match(name)
        component = _COMPONENTS[match[1]] if match else ""
        rest = name[match.end() :] if match else name
        groups.setdefault(component, {})[name] = rest
        held[name] = f"{component}_{rest}"
    if any(name in flat for name in held.values()):  # the model is a whole pipeline
        return held, ()

    def has_inner(name: str) -> bool:
        """Without what may be a parent model's name ("text_model")."""
        return any(name.split("_", cut)[-1] in flat for cut in (1, 2))

    rests = {component: group.values() for component, group in groups.items()}
    chosen = component_of(rests, [flat.__contains__, has_inner], saved.component, saved.where)
    if chosen is None:
        return {name: rest for group in groups.values() for name, rest in group.items()}, ()
    return groups[chosen], tuple(sorted(groups.keys() - {chosen}))


def _unwrapped(names: dict[str, str], flat: Mapping[str, Any]) -> dict[str, str]:
    """`names` without a common wrapper's name: transformers 5 has no `text_model` around CLIP's."""
    lost = [rest for rest in names.values() if rest not in flat]
    for cut in (1, 2):
        starts = {rest[: len(rest) - len(rest.split("_", cut)[-1])] for rest in lost}
        start = next(iter(starts), "")
        if len(starts) == 1 and start and all(rest[len(start) :] in flat for rest in lost):
            return {n: rest if rest in flat else rest[len(start) :] for n, rest in names.items()}
    return names


def _only(saved: Saved, name: str, paths: tuple[str, ...]) -> str:
    if len(paths) > 1:
        raise CheckpointError(
            f"{saved.where}: {name} may be {' or '.join(paths)}, which are spelt alike without "
            "dots; save the adapter in another dialect (diffusers, PEFT)"
        )
    return paths[0]


def _place(found: Translation, path: str, name: str, tensors: Mapping[str, Tensor]) -> None:
    where = found.saved.where
    factors = {_LETTERS[factor]: t for factor, t in tensors.items() if factor != "alpha"}
    alpha = None
    if "alpha" in tensors:
        alpha = alpha_of(f"{where}: {name}.alpha", tensors["alpha"])
        if not factors:
            raise CheckpointError(f"{where}: {name} has an alpha and no factors")
    for letter, tensor in factors.items():
        if letter == "m":
            if tensor.dim() > 1 and tensor.numel() != len(tensor):
                raise UnsupportedAdapterError(
                    f"{where}: {name}.dora_scale has shape {tuple(tensor.shape)}, a scale for each "
                    "input; DoRA here scales outputs (train with wd_on_output), or merge it into a "
                    "copy of the base model"
                )
            tensor = tensor.flatten()
        found.add(path, letter, tensor)
    rank = len(factors["A"]) if "A" in factors and factors["A"].dim() else 0
    if rank:
        found.scales[path] = 1.0 if alpha is None else alpha / rank
