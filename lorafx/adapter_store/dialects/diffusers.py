"""diffusers' adapters: keys that begin with a model of the pipeline.

    unet.<module>.lora_A.weight, .lora_B.weight      as PEFT's
    unet.<module>.lora.down.weight, .lora.up.weight  the same
    unet.<module>.alpha                              α, s = α/r
    unet.<…attn1>.processor.to_q_lora.down.weight    older keys, which diffusers itself converts

A configuration for each model lies in the metadata (`lora_adapter_metadata`). Without it and
without α, diffusers takes α = r, so s = 1. Names of a model's first implementation are left to
diffusers' conversion too.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from lorafx.adapter_store.dialects.components import COMPONENTS, DENOISERS, component_of
from lorafx.adapter_store.dialects.conversion import Converted, converted, peft_keys
from lorafx.adapter_store.dialects.dialect import Dialect, Translation, number
from lorafx.adapter_store.opening import json_object
from lorafx.adapter_store.peft_config import PeftConfig
from lorafx.adapter_store.peft_keys import factor_sizes, parse
from lorafx.adapter_store.saved import AdapterState, Saved
from lorafx.errors import CheckpointError

_METADATA = "lora_adapter_metadata"
_PAIR = re.compile(r"\.lora\.(down|up)\.weight$")
_OLDER = re.compile(r"_lora\.(down|up)\.weight(\.alpha)?$|\.lora_linear_layer\.(down|up)\.")
_ALPHA = re.compile(r"(\.lora_[AB](\.weight)?|\.lora\.down(\.weight)?)?\.alpha$")


class Diffusers(Dialect):
    """unet.<module>.lora_A.weight, or .lora.down.weight, and so on for each model of a pipeline."""

    name = "diffusers"
    keys = "unet.<module>.lora_A.weight or .lora.down.weight"

    def claims(self, saved: Saved) -> bool:
        if _METADATA in saved.metadata:
            return True
        if any(_PAIR.search(key) or _OLDER.search(key) for key in saved.tensors):
            return True
        named = all(key.partition(".")[0] in COMPONENTS for key in saved.tensors)
        return saved.fields is None and named and any(map(parse, saved.tensors))

    def state(self, saved: Saved, model: nn.Module | None) -> AdapterState:
        alphas = {key: number(key, t) for key, t in saved.tensors.items() if key.endswith(".alpha")}
        tensors = {key: t for key, t in saved.tensors.items() if key not in alphas}
        state = self.translated(saved, self, (tensors, alphas), model)
        if model is None or self.lands(state, model):
            return state
        other = converted_for(saved, self, saved.tensors, model)
        return state if other is None else other

    def components(self, saved: Saved) -> tuple[str, ...]:
        return tuple(_groups(saved.tensors))

    def translated(
        self, saved: Saved, dialect: Dialect, made: Converted, model: nn.Module | None
    ) -> AdapterState:
        """`made`, tensors and α by diffusers' names, in PEFT's names."""
        found = Translation(saved, dialect, model)
        groups = _groups(made[0])
        alphas = _groups(made[1])
        whole = model is None or self._as_they_stand(saved, found, groups, bool(made[1]))
        if whole:
            chosen = {
                key: t for g in groups for key, t in _simple(groups[g], g, prefix=True).items()
            }
            own = {k: a for g in alphas for k, a in _simple(alphas[g], g, prefix=True).items()}
            component = ""
        else:
            paths = {g: _paths(_simple(held, g)) for g, held in groups.items()}
            picked = component_of(paths, [found.exists, found.held], saved.component, saved.where)
            if picked is None:
                raise CheckpointError(_nowhere(saved, paths))
            component = picked
            chosen = _simple(groups[component], component)
            own = _simple(alphas.get(component, {}), component)
            if len(groups) > 1:
                found.left_out = tuple(sorted(groups.keys() - {component}))
        for key, tensor in chosen.items():
            factor = parse(key)
            if factor is None:
                found.put(key, tensor)
            else:
                found.add(
                    factor.module,
                    factor.letter,
                    tensor.flatten() if factor.letter == "m" else tensor,
                )
        config = _config(saved, component)
        given = {_ALPHA.sub("", key): alpha for key, alpha in own.items()}
        for path, (_, _, rank) in factor_sizes(chosen).items():
            if not rank:
                continue
            if path in given:
                found.scales[path] = given.pop(path) / rank
            elif config is None:
                found.scales[path] = 1.0
        if given:
            raise CheckpointError(
                f"{saved.where} has α for {', '.join(list(given)[:3])}, and no factors there"
            )
        dora, bias = (
            any(key.endswith(end) for key in found.tensors)
            for end in ("lora_magnitude_vector", "lora_B.bias")
        )
        return found.state(config or PeftConfig(r=None, use_dora=dora, lora_bias=bias))

    @staticmethod
    def lands(state: AdapterState, model: nn.Module) -> bool:
        """Whether each factor is for a module of the model."""
        found = Translation(Saved({}, None, {}, ""), Diffusers(), model)
        factors = [factor for key in state.tensors if (factor := parse(key)) is not None]
        return bool(factors) and all(found.module(factor.module) is not None for factor in factors)

    @staticmethod
    def _as_they_stand(
        saved: Saved, found: Translation, groups: Mapping[str, Any], alphas: bool
    ) -> bool:
        """Whether the names are the model's own: it holds the models of a pipeline, or has other
        children of such names, and then nothing says that α = r."""
        held = {name: found.module(name) for name in groups}
        if saved.component is not None or any(module is None for module in held.values()):
            return not any(name in COMPONENTS for name in groups)
        known = alphas or saved.fields is not None or _METADATA in saved.metadata
        if len(groups) == 1 and not known:
            name = next(iter(groups))
            raise CheckpointError(
                f"{saved.where} has no configuration, and {name!r} is a module of this model: it "
                "may be PEFT's file without adapter_config.json, or a pipeline's, whose α is r. "
                "Give AdapterSource(..., config={'r': ..., 'lora_alpha': ...})"
            )
        return True


def converted_for(
    saved: Saved, dialect: Dialect, tensors: Mapping[str, Tensor], model: nn.Module
) -> AdapterState | None:
    """What diffusers makes of names of a model's first implementation; None where it does not know
    them.

    Raises as `conversion.converted`.
    """
    reader = Diffusers()
    if saved.component in DENOISERS:  # conversions call it what its pipeline does
        saved = replace(saved, component=None)

    def lands(made: Converted) -> bool:
        try:
            return reader.lands(reader.translated(saved, dialect, made, model), model)
        except CheckpointError:
            return False

    made = converted(tensors, model, lands)
    if made is None:
        return None
    state = reader.translated(saved, dialect, made, model)
    return replace(state, notes=(*state.notes, "its names were converted by diffusers"))


def _groups(values: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Values by component, and by key without it; "" for keys that begin with none."""
    groups: dict[str, dict[str, Any]] = {}
    for key, value in values.items():
        component, _, rest = key.partition(".")
        known = component in COMPONENTS and bool(rest)
        groups.setdefault(component if known else "", {})[rest if known else key] = value
    return groups


def _simple(values: Mapping[str, Any], component: str, prefix: bool = False) -> dict[str, Any]:
    """`values` of one component under keys with `lora_A` and `lora_B`."""
    if any(_OLDER.search(key) for key in values):
        values = peft_keys(values, component)
    named = {
        _PAIR.sub(lambda m: ".lora_A.weight" if m[1] == "down" else ".lora_B.weight", key): value
        for key, value in values.items()
    }
    if len(named) < len(values):
        twice = next(key for key in values if _PAIR.search(key))
        raise CheckpointError(f"{twice!r:.200} is there by two names; keep one")
    return {f"{component}.{k}": v for k, v in named.items()} if prefix and component else named


def _paths(values: Mapping[str, Any]) -> list[str]:
    return [factor.module for key in values if (factor := parse(key)) is not None]


def _config(saved: Saved, component: str) -> PeftConfig | None:
    """The configuration of one component, where there is one."""
    if saved.fields is not None:
        return PeftConfig.read(saved.fields, where=f"the configuration of {saved.where}")
    if _METADATA not in saved.metadata:
        return None
    where = f"{_METADATA} in the metadata of {saved.where}"
    fields = json_object(saved.metadata[_METADATA], where)
    begin = f"{component}." if component else ""
    own = {key.removeprefix(begin): v for key, v in fields.items() if key.startswith(begin)}
    return PeftConfig.read(own, where=where) if own else None


def _nowhere(saved: Saved, paths: Mapping[str, list[str]]) -> str:
    first = "; ".join(f"{g}: {own[0]}" for g, own in paths.items() if own)
    return (
        f"{saved.where} has factors for {', '.join(paths)}, and none of their modules is in this "
        f"model ({first}); it was made for another model"
    )
