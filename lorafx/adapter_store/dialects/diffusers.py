"""diffusers' adapters: keys that begin with a model of the pipeline.

    unet.<module>.lora_A.weight, .lora_B.weight      as PEFT's
    unet.<module>.lora.down.weight, .lora.up.weight  the same
    unet.<module>.alpha                              α, s = α/r
    unet.<…attn1>.processor.to_q_lora.down.weight    older keys, which diffusers itself converts

Without α or a configuration in the metadata (`lora_adapter_metadata`), α = r. Names of a model's
first implementation are read by the conversion of diffusers whose factors all belong to modules.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lorafx.adapter_store.dialects.dialect import DENOISERS, Translation, alpha_of
from lorafx.adapter_store.dialects.loaders import conversions
from lorafx.adapter_store.peft_config import PeftConfig, json_object
from lorafx.adapter_store.peft_keys import factor_sizes, parse
from lorafx.adapter_store.places import Places
from lorafx.adapter_store.saved import AdapterState, Saved
from lorafx.errors import CheckpointError, UnsupportedAdapterError
from lorafx.progress import LOG

KEYS = "unet.<module>.lora_A.weight or .lora.down.weight"
#: Names of models by pipelines and by files of first implementations.
COMPONENTS = frozenset(
    {
        *("unet", "transformer", "transformer_2", "transformer_3", "prior", "connectors"),
        *("text_encoder", "text_encoder_2", "text_encoder_3", "diffusion_model"),
    }
)
#: Conversions scan all keys, some once per key.
_MOST_KEYS = 20_000
_METADATA = "lora_adapter_metadata"
_PAIR = re.compile(r"\.lora\.(down|up)\.weight$")
_OLDER = re.compile(r"_lora\.(down|up)\.weight(\.alpha)?$|\.lora_linear_layer\.(down|up)\.")
_ALPHA = re.compile(r"(\.lora_[AB](\.weight)?|\.lora\.down(\.weight)?)?\.alpha$")


def claims(saved: Saved) -> bool:
    if _METADATA in saved.metadata:
        return True
    if any(_PAIR.search(key) or _OLDER.search(key) for key in saved.tensors):
        return True
    named = all(key.partition(".")[0] in COMPONENTS for key in saved.tensors)
    return saved.fields is None and named and any(map(parse, saved.tensors))


def components(saved: Saved) -> tuple[str, ...]:
    return tuple(_groups(saved.tensors))


def state(saved: Saved, model: nn.Module | None) -> AdapterState:
    alphas = {k: alpha_of(k, t) for k, t in saved.tensors.items() if k.endswith(".alpha")}
    return translated(saved, "diffusers", {**saved.tensors, **alphas}, model)


def translated(
    saved: Saved,
    dialect: str,
    values: Mapping[str, Tensor | float],
    model: nn.Module | None,
    component_of: Callable[[str], str] = lambda key: _component_of(key)[0],
) -> AdapterState:
    """Factors and α under diffusers' names as `AdapterState`. If the model lacks their modules, and
    diffusers can convert `saved`, its conversion; `component_of` the keys that this loses. Raises
    as `_converted`."""
    state = _translated(saved, dialect, values, model)
    if model is None or _fits(model, state):
        return state
    return _converted(saved, dialect, model, component_of) or state


def _converted(
    saved: Saved, dialect: str, model: nn.Module, component_of: Callable[[str], str]
) -> AdapterState | None:
    """diffusers' conversion of first implementations' names, if any. Raises CheckpointError for
    ambiguous conversions, UnsupportedAdapterError for incomplete ones."""
    if len(saved.tensors) > _MOST_KEYS:
        return None
    if saved.component in DENOISERS:  # conversions use the pipeline's name
        saved = replace(saved, component=None)
    states: dict[str, AdapterState] = {}
    for name, converted, lost in conversions(saved.tensors, model):
        try:
            state = _translated(saved, dialect, converted, model)
        except Exception:  # of names of other models
            continue
        if _fits(model, state) and not any(_equal(state, other) for other in states.values()):
            here = {_component_of(key)[0] for key in converted} - set(state.left_out)
            own = {"", *here, *(DENOISERS if here.intersection(DENOISERS) else ())}
            elsewhere = {component_of(key) for key in lost} - own
            states[name] = replace(
                state,
                left_out=tuple(sorted({*state.left_out, *elsewhere})),
                lost=tuple(key for key in lost if component_of(key) in own),
            )
    if len(states) > 1:
        raise CheckpointError(
            f"diffusers converts these names in different ways for this model ({', '.join(states)}"
            "); convert the adapter by the pipeline that it is for, and save it again"
        )
    dora = next((key for key in saved.tensors if "dora_scale" in key), None)
    if states and dora is not None:
        raise UnsupportedAdapterError(
            f"{dora} belongs to DoRA, which diffusers' conversion of these names leaves out; save "
            "the adapter under the names that diffusers has for the model"
        )
    for state in states.values():
        LOG.info("adapter in %s: its names were converted by diffusers", state.where)
        return state
    return None


def _equal(first: AdapterState, second: AdapterState) -> bool:
    if first.tensors.keys() != second.tensors.keys() or first.scales != second.scales:
        return False
    return all(torch.equal(t, second.tensors[key]) for key, t in first.tensors.items())


def _fits(model: nn.Module, state: AdapterState) -> bool:
    places = Places((), model)
    factors = [factor for key in state.tensors if (factor := parse(key)) is not None]
    return bool(factors) and all(places.module(factor.module) is not None for factor in factors)


def _translated(
    saved: Saved, dialect: str, values: Mapping[str, Tensor | float], model: nn.Module | None
) -> AdapterState:
    translation = Translation(saved, dialect, model)
    groups, component = _groups(values), None
    has_alphas = any(isinstance(value, float) for value in values.values())
    if model is not None and not _is_whole_pipeline(saved, translation, groups, has_alphas):
        paths = {g: list(factor_sizes(_tensors(_renamed(ts, g)))) for g, ts in groups.items()}
        component = _component(saved, paths, translation)
    if component is None:
        chosen = {k: t for g in groups for k, t in _renamed(groups[g], g, prefix=True).items()}
    else:
        chosen = _renamed(groups[component], component)
        translation.left_out = tuple(sorted(groups.keys() - {component}))
    tensors = _tensors(chosen)
    for key, tensor in tensors.items():
        factor = parse(key)
        if factor is None:
            translation.put(key, tensor)
        else:
            vector = factor.letter == "m"
            translation.add(factor.module, factor.letter, tensor.flatten() if vector else tensor)
    config = _config(saved, component or "")
    alphas_by_path = {_ALPHA.sub("", key): a for key, a in chosen.items() if isinstance(a, float)}
    for path, (_, _, rank) in factor_sizes(tensors).items():
        if rank and path in alphas_by_path:
            translation.scales[path] = alphas_by_path.pop(path) / rank
        elif rank and config is None:
            translation.scales[path] = 1.0
    if alphas_by_path:
        raise CheckpointError(
            f"{saved.where} has α for {', '.join(list(alphas_by_path)[:3])}, and no factors there"
        )
    return translation.state(config)


def _tensors(values: Mapping[str, Tensor | float]) -> dict[str, Tensor]:
    return {key: value for key, value in values.items() if isinstance(value, Tensor)}


def _is_whole_pipeline(
    saved: Saved, translation: Translation, groups: Mapping[str, Any], has_alphas: bool
) -> bool:
    """Whether the model has the file's components as children; α = r is not implied then."""
    if saved.component is not None or not all(map(translation.exists, groups)):
        return COMPONENTS.isdisjoint(groups)
    scales_known = has_alphas or saved.fields is not None or _METADATA in saved.metadata
    if len(groups) == 1 and not scales_known:
        name = next(iter(groups))
        raise CheckpointError(
            f"{saved.where} has no configuration, and {name!r} is a module of this model: it "
            "may be PEFT's file without adapter_config.json, or a pipeline's, whose α is r. "
            "Give AdapterSource(..., config={'r': ..., 'lora_alpha': ...})"
        )
    return True


def _component(saved: Saved, paths: Mapping[str, list[str]], factors: Translation) -> str | None:
    """The component that the model is: `saved.component`, the only one, or the one whose paths the
    model has. Raises CheckpointError if several fit, or if the file lacks `saved.component`."""
    chosen = saved.component
    if chosen is not None and chosen not in paths:
        raise CheckpointError(
            f"{saved.where} has no factors for the component {chosen!r}; it has some for "
            f"{', '.join(sorted(paths))}"
        )
    if chosen is not None or len(paths) == 1:
        return chosen or next(iter(paths))
    exists = {name: list(map(factors.exists, names)) for name, names in paths.items()}
    fitting = [name for name in exists if any(exists[name])]
    complete = [name for name in fitting if all(exists[name])]
    fitting = complete if len(complete) == 1 else fitting
    if len(fitting) > 1:
        raise CheckpointError(
            f"{saved.where} has factors for {' and '.join(fitting)}, which both fit this model; "
            f"say which by AdapterSource(..., component={fitting[0]!r})"
        )
    return fitting[0] if fitting else None


def _groups(values: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Values by component ("" for none), and by the remaining key."""
    groups: dict[str, dict[str, Any]] = {}
    for key, value in values.items():
        component, name = _component_of(key)
        groups.setdefault(component, {})[name] = value
    return groups


def _component_of(key: str) -> tuple[str, str]:
    component, _, name = key.partition(".")
    return (component, name) if component in COMPONENTS and name else ("", key)


def _renamed(values: Mapping[str, Any], component: str, prefix: bool = False) -> dict[str, Any]:
    if any(_OLDER.search(key) for key in values):
        values = _convert_older_keys(values, component)
    renamed = {
        _PAIR.sub(lambda m: ".lora_A.weight" if m[1] == "down" else ".lora_B.weight", key): value
        for key, value in values.items()
    }
    if len(renamed) < len(values):
        duplicate = next(key for key in values if _PAIR.search(key))
        raise CheckpointError(f"{duplicate!r:.200} is there by two names; keep one")
    return {f"{component}.{k}": v for k, v in renamed.items()} if prefix and component else renamed


def _convert_older_keys(tensors: Mapping[str, Any], component: str) -> dict[str, Any]:
    example, target = f"{next(iter(tensors))!r:.200}", component or "this model"
    try:
        utils: Any = importlib.import_module("diffusers.utils.state_dict_utils")
    except ImportError:
        raise CheckpointError(
            f"{example} is an older key of diffusers, which its own conversion reads: pip install "
            "'lorafx[diffusers]'"
        ) from None
    try:
        if component.startswith("text_encoder"):
            old = utils.StateDictType.DIFFUSERS_OLD  # which diffusers tells by outputs alone
            converted: dict[str, Any] = utils.convert_state_dict_to_peft(dict(tensors), old)
        else:
            converted = utils.convert_unet_state_dict_to_peft(dict(tensors))
    except Exception as error:
        raise CheckpointError(
            f"diffusers cannot read the keys for {target} ({example}, ...): {error!s:.200}"
        ) from error
    if len(converted) < len(tensors):
        raise CheckpointError(
            f"{len(tensors)} keys for {target} have {len(converted)} meanings ({example}, ...); "
            "keep one of each"
        )
    return converted


def _config(saved: Saved, component: str) -> PeftConfig | None:
    if saved.fields is not None:
        return PeftConfig.read(saved.fields, where=f"the configuration of {saved.where}")
    if _METADATA not in saved.metadata:
        return None
    where = f"{_METADATA} in the metadata of {saved.where}"
    fields = json_object(saved.metadata[_METADATA], where)
    prefix = f"{component}." if component else ""
    chosen = {key.removeprefix(prefix): v for key, v in fields.items() if key.startswith(prefix)}
    return PeftConfig.read(chosen, where=where) if chosen else None
