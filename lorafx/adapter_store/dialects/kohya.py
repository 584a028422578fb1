"""Files of kohya's sd-scripts and of A1111: paths whose dots have become underscores.

    lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight   A
    ….lora_up.weight   B;   ….alpha   α, s = α/r, and 1 where it is absent;   ….dora_scale   m

Which module a name means is found by flattening the model's own names: all of them once. A name
that two modules have is refused. Where none has it, diffusers' conversion for the model decides:
many such files have the names of a model's first implementation.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from lorafx.adapter_store.dialects.components import component_of
from lorafx.adapter_store.dialects.dialect import Dialect, Translation, number
from lorafx.adapter_store.dialects.diffusers import converted_for
from lorafx.adapter_store.peft_config import PeftConfig
from lorafx.adapter_store.saved import AdapterState, Saved
from lorafx.errors import CheckpointError, UnsupportedAdapterError, nearest
from lorafx.model.saved_names import without_compiled

_KEY = re.compile(
    r"(?P<name>[^.]+)\.(?P<factor>lora_down\.weight|lora_up\.weight|lora_[AB]\.weight|alpha|"
    r"dora_scale)"
)
_LETTERS = {
    "lora_down.weight": "A",
    "lora_up.weight": "B",
    "lora_A.weight": "A",
    "lora_B.weight": "B",
    "dora_scale": "m",
}
#: What files call the models of a pipeline, and what pipelines call them.
COMPONENTS: Mapping[str, str] = {
    "lora_unet": "unet",
    "lora_transformer": "transformer",
    "lora_te": "text_encoder",
    "lora_te1": "text_encoder",
    "lora_te2": "text_encoder_2",
    "lora_te3": "text_encoder_3",
    "lora_prior_unet": "prior",
    "lora_prior_te": "text_encoder",
}
_PREFIX = re.compile(rf"({'|'.join(sorted(COMPONENTS, key=len, reverse=True))})_")


class Kohya(Dialect):
    """lora_unet_<path with underscores>.lora_down.weight, .lora_up.weight, .alpha."""

    name = "kohya"
    keys = "lora_unet_<module with underscores>.lora_down.weight"

    def claims(self, saved: Saved) -> bool:
        return any(_PREFIX.match(key) and _KEY.fullmatch(key) for key in saved.tensors)

    def state(self, saved: Saved, model: nn.Module | None) -> AdapterState:
        others = [key for key in saved.tensors if _KEY.fullmatch(key) is None]
        if others:
            raise CheckpointError(
                f"{saved.where} has {len(others)} keys that are not kohya's (such as "
                f"{others[0][:200]!r}): {self.keys}, .lora_up.weight, .alpha, .dora_scale"
            )
        found, modules = Translation(saved, self, model), _by_name(saved)
        if model is None:
            paths = {name: name for name in modules}
        else:
            flat = _flattened(model)
            mine, found.left_out = _of_this_model(modules, saved, flat)
            mine = _unwrapped(mine, flat)
            lost = [name for name, own in mine.items() if own not in flat]
            if lost:
                other = converted_for(saved, self, saved.tensors, model)
                if other is not None:
                    return other
                raise CheckpointError(_unknown(saved, lost, mine, flat))
            paths = {name: _only(saved, name, flat[own]) for name, own in mine.items()}
        for name, path in paths.items():
            _place(found, path, name, modules[name])
        dora = any(path.endswith("lora_magnitude_vector") for path in found.tensors)
        return found.state(PeftConfig(r=None, use_dora=dora))

    def components(self, saved: Saved) -> tuple[str, ...]:
        matches = map(_PREFIX.match, saved.tensors)
        return tuple(dict.fromkeys(COMPONENTS[m[1]] if m else "" for m in matches))


def _by_name(saved: Saved) -> dict[str, dict[str, Tensor]]:
    modules: dict[str, dict[str, Tensor]] = {}
    for key, tensor in saved.tensors.items():
        name, _, factor = key.partition(".")
        modules.setdefault(name, {})[factor] = tensor
    return modules


def _flattened(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Paths of the modules that hold weights, by what they are without dots."""
    found: dict[str, list[str]] = {}
    for path, module in model.named_modules():
        if path and module._parameters:
            own = without_compiled(path)
            found.setdefault(own.replace(".", "_"), []).append(own)
    return {name: tuple(dict.fromkeys(paths)) for name, paths in found.items()}


def _of_this_model(
    names: Iterable[str], saved: Saved, flat: Mapping[str, tuple[str, ...]]
) -> tuple[dict[str, str], tuple[str, ...]]:
    """What this model's modules may be called without dots, by the names in the file that are for
    it, and the components of the others."""
    groups: dict[str, dict[str, str]] = {}
    for name in names:
        match = _PREFIX.match(name)
        component = COMPONENTS[match[1]] if match else ""
        groups.setdefault(component, {})[name] = name[match.end() :] if match else name
    held = {
        name: f"{component}_{rest}"
        for component, own in groups.items()
        for name, rest in own.items()
    }
    if any(own in flat for own in held.values()):  # it holds the models of a pipeline
        return held, ()
    rests = {component: own.values() for component, own in groups.items()}
    has = [flat.__contains__, lambda name: any(rest in flat for rest in _shorter(name))]
    chosen = component_of(rests, has, saved.component, saved.where)
    if chosen is None:
        return {name: rest for own in groups.values() for name, rest in own.items()}, ()
    return groups[chosen], tuple(sorted(groups.keys() - {chosen}))


def _shorter(name: str) -> list[str]:
    """A name without what may be the model that held this one ("text_model")."""
    return [name.split("_", cut)[-1] for cut in (1, 2)]


def _unwrapped(names: dict[str, str], flat: Mapping[str, Any]) -> dict[str, str]:
    """`names` without a beginning that all those share which are of no module, where each is one's
    whole path then: transformers 5 has no `text_model` around CLIP's."""
    lost = [own for own in names.values() if own not in flat]
    for cut in (1, 2):
        starts = {own[: len(own) - len(own.split("_", cut)[-1])] for own in lost}
        start = next(iter(starts), "")
        if len(starts) == 1 and start and all(own[len(start) :] in flat for own in lost):
            return {n: own if own in flat else own[len(start) :] for n, own in names.items()}
    return names


def _only(saved: Saved, name: str, paths: tuple[str, ...]) -> str:
    if len(paths) > 1:
        raise CheckpointError(
            f"{saved.where}: {name} may be {' or '.join(paths)}, which are spelt alike without "
            "dots; save the adapter in another dialect (diffusers, PEFT)"
        )
    return paths[0]


def _unknown(
    saved: Saved, lost: list[str], mine: Mapping[str, str], flat: Mapping[str, tuple[str, ...]]
) -> str:
    known = list(flat)[:1000]
    lines = "; ".join(f"{name}{nearest(mine[name], known, 1)}" for name in lost[:3])
    return (
        f"{saved.where} (kohya): {len(lost)} of its {len(mine)} names are of no module of this "
        f"model, and diffusers, where it is installed, has no conversion for it: {lines}"
    )


def _place(found: Translation, path: str, name: str, own: Mapping[str, Tensor]) -> None:
    """The factors of one module, and s."""
    where = found.saved.where
    rank = 0
    for factor, tensor in own.items():
        if factor == "alpha":
            continue
        letter = _LETTERS[factor]
        if letter == "m":
            if tensor.dim() > 1 and tensor.numel() != len(tensor):
                raise UnsupportedAdapterError(
                    f"{where}: {name}.dora_scale has shape {tuple(tensor.shape)}, a scale for each "
                    "input; DoRA here scales outputs (train with wd_on_output), or merge it into a "
                    "copy of the base model"
                )
            tensor = tensor.flatten()
        elif letter == "A":
            rank = len(tensor) if tensor.dim() else 0
        found.add(path, letter, tensor)
    alpha = own.get("alpha")
    value = None if alpha is None else number(f"{where}: {name}.alpha", alpha)
    if value is not None and not own.keys() - {"alpha"}:
        raise CheckpointError(f"{where}: {name} has an alpha and no factors")
    if rank:
        found.scales[path] = 1.0 if value is None else value / rank
