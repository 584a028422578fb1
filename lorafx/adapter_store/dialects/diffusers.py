"""diffusers' adapters: keys that begin with a model of the pipeline.

    unet.<module>.lora_A.weight, .lora_B.weight      as PEFT's
    unet.<module>.lora.down.weight, .lora.up.weight  the same
    unet.<module>.alpha                              α, s = α/r
    unet.<…attn1>.processor.to_q_lora.down.weight    older keys, which diffusers itself converts

Without α or a configuration in the metadata (`lora_adapter_metadata`), α = r. For names of a
model's first implementation, the diffusers conversion counts whose factors all land on modules.
"""

from __future__ import annotations

import importlib
import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lorafx.adapter_store.dialects.dialect import DENOISERS, Translation, alpha_of
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
    saved: Saved, dialect: str, values: Mapping[str, Tensor | float], model: nn.Module | None
) -> AdapterState:
    """Factors and α under diffusers' names as `AdapterState`, or what diffusers converts `saved`
    to where their modules are not the model's. Raises as `converted_by_diffusers`."""
    found = _translated(saved, dialect, values, model)
    if model is None or _lands(found, model):
        return found
    return converted_by_diffusers(saved, dialect, model) or found


def converted_by_diffusers(saved: Saved, dialect: str, model: nn.Module) -> AdapterState | None:
    """diffusers' conversion of first implementations' names, if any. Raises CheckpointError for
    ambiguous conversions, UnsupportedAdapterError for incomplete ones."""
    if len(saved.tensors) > _MOST_KEYS:
        return None
    if saved.component in DENOISERS:  # conversions use the pipeline's name
        saved = replace(saved, component=None)
    config = getattr(model, "config", None)  # a UNet's decides the numbers of blocks
    blocks = config if hasattr(config, "layers_per_block") else None
    found: dict[str, AdapterState] = {}
    for name, loader in _loaders():
        try:
            with _silence():
                made = loader.lora_state_dict(dict(saved.tensors), unet_config=blocks)
            tensors, *rest = made if isinstance(made, tuple) else (made,)
            alphas = {key: float(value) for key, value in (rest[0] if rest else {}).items()}
            if tensors.keys() == saved.tensors.keys():
                continue
            state = _translated(saved, dialect, {**tensors, **alphas}, model)
        except Exception:  # conversions of other models raise anything
            continue
        if _lands(state, model) and not any(_equal(state, other) for other in found.values()):
            found[name] = state
    if len(found) > 1:
        raise CheckpointError(
            f"diffusers converts these names in different ways for this model ({', '.join(found)});"
            " convert the adapter by the pipeline that it is for, and save it again"
        )
    dora = next((key for key in saved.tensors if "dora_scale" in key), None)
    if found and dora is not None:
        raise UnsupportedAdapterError(
            f"{dora} belongs to DoRA, which diffusers' conversion of these names leaves out; save "
            "the adapter under the names that diffusers has for the model"
        )
    for state in found.values():
        LOG.info("adapter in %s: its names were converted by diffusers", state.where)
        return state
    return None


def _loaders() -> Iterator[tuple[str, Any]]:
    try:
        pipelines: Any = importlib.import_module("diffusers.loaders.lora_pipeline")
    except ImportError:
        return
    seen: set[Any] = set()
    for name, loader in vars(pipelines).items():
        conversion = isinstance(loader, type) and vars(loader).get("lora_state_dict")
        if conversion and conversion not in seen:
            seen.add(conversion)
            yield name, loader


@contextmanager
def _silence() -> Iterator[None]:
    log = logging.getLogger("diffusers")
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        log.setLevel(level)


def _equal(first: AdapterState, second: AdapterState) -> bool:
    pairs = first.tensors.keys() == second.tensors.keys() and first.scales == second.scales
    return pairs and all(torch.equal(t, second.tensors[key]) for key, t in first.tensors.items())


def _lands(state: AdapterState, model: nn.Module) -> bool:
    places = Places((), model)
    factors = [factor for key in state.tensors if (factor := parse(key)) is not None]
    return bool(factors) and all(places.module(factor.module) is not None for factor in factors)


def _translated(
    saved: Saved, dialect: str, values: Mapping[str, Tensor | float], model: nn.Module | None
) -> AdapterState:
    found = Translation(saved, dialect, model)
    groups, component = _groups(values), None
    alphas = any(isinstance(value, float) for value in values.values())
    if model is not None and not _as_they_stand(saved, found, groups, alphas):
        paths = {g: list(factor_sizes(_tensors(_simple(held, g)))) for g, held in groups.items()}
        component = _component(saved, paths, found)
    if component is None:
        chosen = {k: t for g in groups for k, t in _simple(groups[g], g, prefix=True).items()}
    else:
        chosen = _simple(groups[component], component)
        found.left_out = tuple(sorted(groups.keys() - {component}))
    tensors = _tensors(chosen)
    for key, tensor in tensors.items():
        factor = parse(key)
        if factor is None:
            found.put(key, tensor)
        else:
            vector = factor.letter == "m"
            found.add(factor.module, factor.letter, tensor.flatten() if vector else tensor)
    config = _config(saved, component or "")
    given = {_ALPHA.sub("", key): a for key, a in chosen.items() if isinstance(a, float)}
    for path, (_, _, rank) in factor_sizes(tensors).items():
        if rank and path in given:
            found.scales[path] = given.pop(path) / rank
        elif rank and config is None:
            found.scales[path] = 1.0
    if given:
        raise CheckpointError(
            f"{saved.where} has α for {', '.join(list(given)[:3])}, and no factors there"
        )
    return found.state(config)


def _tensors(values: Mapping[str, Tensor | float]) -> dict[str, Tensor]:
    return {key: value for key, value in values.items() if isinstance(value, Tensor)}


def _as_they_stand(
    saved: Saved, found: Translation, groups: Mapping[str, Any], alphas: bool
) -> bool:
    """Whether the model is a whole pipeline, or has such children; then α = r is not implied."""
    if saved.component is not None or not all(map(found.exists, groups)):
        return COMPONENTS.isdisjoint(groups)
    known = alphas or saved.fields is not None or _METADATA in saved.metadata
    if len(groups) == 1 and not known:
        name = next(iter(groups))
        raise CheckpointError(
            f"{saved.where} has no configuration, and {name!r} is a module of this model: it "
            "may be PEFT's file without adapter_config.json, or a pipeline's, whose α is r. "
            "Give AdapterSource(..., config={'r': ..., 'lora_alpha': ...})"
        )
    return True


def _component(saved: Saved, paths: Mapping[str, list[str]], found: Translation) -> str | None:
    """The component whose paths are the model's: `saved.component`, the only one, or the one that
    has such paths. Raises CheckpointError where several fit, or the given one is not in the file.
    """
    given = saved.component
    if given is not None and given not in paths:
        raise CheckpointError(
            f"{saved.where} has no factors for the component {given!r}; it has some for "
            f"{', '.join(sorted(paths))}"
        )
    if given is not None or len(paths) == 1:
        return given or next(iter(paths))
    known = {name: [found.exists(path) for path in own] for name, own in paths.items()}
    fit = [name for name in known if any(known[name])]
    whole = [name for name in fit if all(known[name])]
    fit = whole if len(whole) == 1 else fit
    if len(fit) > 1:
        raise CheckpointError(
            f"{saved.where} has factors for {' and '.join(fit)}, which both fit this model; "
            f"say which by AdapterSource(..., component={fit[0]!r})"
        )
    return fit[0] if fit else None


def _groups(values: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Values by component ("" for none), and by the rest of the key."""
    groups: dict[str, dict[str, Any]] = {}
    for key, value in values.items():
        component, _, rest = key.partition(".")
        known = component in COMPONENTS and bool(rest)
        groups.setdefault(component if known else "", {})[rest if known else key] = value
    return groups


def _simple(values: Mapping[str, Any], component: str, prefix: bool = False) -> dict[str, Any]:
    if any(_OLDER.search(key) for key in values):
        values = _of_older_keys(values, component)
    named = {
        _PAIR.sub(lambda m: ".lora_A.weight" if m[1] == "down" else ".lora_B.weight", key): value
        for key, value in values.items()
    }
    if len(named) < len(values):
        twice = next(key for key in values if _PAIR.search(key))
        raise CheckpointError(f"{twice!r:.200} is there by two names; keep one")
    return {f"{component}.{k}": v for k, v in named.items()} if prefix and component else named


def _of_older_keys(tensors: Mapping[str, Any], component: str) -> dict[str, Any]:
    first, target = f"{next(iter(tensors))!r:.200}", component or "this model"
    try:
        utils: Any = importlib.import_module("diffusers.utils")
    except ImportError:
        raise CheckpointError(
            f"{first} is an older key of diffusers, which its own conversion reads: pip install "
            "'lorafx[diffusers]'"
        ) from None
    try:
        if component.startswith("text_encoder"):
            old = utils.convert_state_dict_to_diffusers(dict(tensors))
            found: dict[str, Any] = utils.convert_state_dict_to_peft(old)
        else:
            found = utils.convert_unet_state_dict_to_peft(dict(tensors))
    except Exception as error:
        raise CheckpointError(
            f"diffusers cannot read the keys for {target} ({first}, ...): {error!s:.200}"
        ) from error
    if len(found) < len(tensors):
        raise CheckpointError(
            f"{len(tensors)} keys for {target} have {len(found)} meanings ({first}, ...); keep one "
            "of each"
        )
    return found


def _config(saved: Saved, component: str) -> PeftConfig | None:
    if saved.fields is not None:
        return PeftConfig.read(saved.fields, where=f"the configuration of {saved.where}")
    if _METADATA not in saved.metadata:
        return None
    where = f"{_METADATA} in the metadata of {saved.where}"
    fields = json_object(saved.metadata[_METADATA], where)
    begin = f"{component}." if component else ""
    chosen = {key.removeprefix(begin): v for key, v in fields.items() if key.startswith(begin)}
    return PeftConfig.read(chosen, where=where) if chosen else None
