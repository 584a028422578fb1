"""Converts adapters of any dialect to PEFT's names, for the readers; and reports their contents for
`lorafx inspect`, without a model.

    source ─▶ Saved ─▶ factors of other methods ─▶ dialect ─▶ moved ─▶ AdapterState
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from lorafx.adapter_store.changed_weight import ChangedWeight
from lorafx.adapter_store.dialects import files, mlx
from lorafx.adapter_store.dialects.spelling import NamedTensor
from lorafx.adapter_store.field_checks import is_off
from lorafx.adapter_store.methods.factored import as_factors
from lorafx.adapter_store.methods.method import of_delta
from lorafx.adapter_store.methods.table import REFUSED_KEYS
from lorafx.adapter_store.moved import with_present_paths
from lorafx.adapter_store.peft_config import PeftConfig, raw_fields
from lorafx.adapter_store.peft_keys import FactorSizes, factor_sizes, parse, without_prefix
from lorafx.adapter_store.places import Places
from lorafx.adapter_store.saved import AdapterSource, AdapterState, Saved, read_source
from lorafx.errors import (
    CheckpointError,
    ConfigError,
    UnsupportedAdapterError,
    itemised,
    nearest,
)
from lorafx.model.bank import SharedPair
from lorafx.model.convolutions import weight_shape
from lorafx.registry import lookup

#: The names of dialects in `AdapterSource.dialect`.
DIALECTS = ("mlx", "kohya", "diffusers", "loralib", "peft")


def components(saved: Saved, dialect: str | None) -> tuple[str, ...]:
    """The models of a pipeline that the keys name, "" for none. Raises as `load_state`."""
    parts = _parts(as_factors(saved), dialect)
    return tuple(dict.fromkeys(part.component for part in parts))


def _parts(saved: Saved, dialect: str | None) -> list[NamedTensor]:
    """The tensors by `spelling`. Raises ConfigError for an unknown `dialect`,
    UnsupportedAdapterError for keys of another method, CheckpointError for unknown keys."""
    if dialect not in (None, *DIALECTS):
        raise ConfigError(
            f"there is no dialect {dialect!r}{nearest(str(dialect), DIALECTS)}; dialects are "
            f"{', '.join(DIALECTS)}"
        )
    if dialect is None and not isinstance(saved.fields, PeftConfig):
        _refuse_other_methods(saved)
    parts = files.parts_of(saved, dialect)
    if dialect is saved.fields is None and not any(part.letter for part in parts):
        first = ", ".join(repr(key[:100]) for key in list(saved.tensors)[:3]) or "no tensors"
        raise CheckpointError(
            f"{saved.where} has keys of no known dialect ({first}); those of factors end in "
            ".lora_A.weight, .lora.down.weight, .lora_down.weight, .lora_a.weight or .lora_a"
        )
    return parts


def _refuse_other_methods(saved: Saved) -> None:
    keys_by_method: dict[str, list[str]] = {}
    for key in saved.tensors:
        method = next((method for p, method in REFUSED_KEYS if p.fullmatch(key)), None)
        if method is not None:
            keys_by_method.setdefault(method, []).append(key)
    if keys_by_method:
        lines = (
            f"{method}: {len(keys)} keys, such as {keys[0][:200]!r}"
            for method, keys in keys_by_method.items()
        )
        end = (
            "lorafx serves sums of s·B A, and what can be read into it; merge it into a copy of "
            "the base model by the library that trained it, or convert it"
        )
        raise UnsupportedAdapterError(itemised(f"{saved.where} holds what is no LoRA", lines, end))


def load_state(source: Any, model: nn.Module | None = None) -> AdapterState:
    """Configuration and tensors of `source`, in PEFT's names.

    `source` is an `AdapterSource`, a valid `source` of it, or an `AdapterState`, which is returned.
    `model` resolves flattened names and tells embeddings from linears. Raises CheckpointError and
    UnsupportedAdapterError.
    """
    if isinstance(source, AdapterState):
        return source
    adapter = source if isinstance(source, AdapterSource) else AdapterSource(source)
    saved = read_source(adapter)
    if adapter.dialect == "mlx" or (adapter.dialect is None and mlx.claims(saved)):
        state = mlx.state(saved, model)
    else:
        saved = as_factors(saved, model)
        state = files.state(saved, _parts(saved, adapter.dialect), model, adapter.dialect)
    state = with_present_paths(state, adapter, model)
    if model is not None and state.made:
        state = _with_kernels(state, model)
    return state if adapter.component is None else replace(state, left_out=())


def no_pair(path: str, weight: ChangedWeight) -> None:
    """For `with_factors` everywhere."""


def with_factors(
    state: AdapterState, serves: Callable[[str, ChangedWeight], SharedPair | None] = no_pair
) -> AdapterState:
    """`state` with factors of scaled pairs but at the modules, by saved path, that `serves` finds
    an equal pair for, which takes the place of theirs."""
    scales, tensors, made = dict(state.scales), dict(state.tensors), dict(state.made)
    for key, of in state.made.items():
        path, weight = key.removesuffix(".lora_W.weight"), of.weight
        if weight is None or weight.pair is None:
            continue
        pair = serves(path, weight)
        if pair is not None:
            made[key] = of._replace(weight=weight.on(pair))
            continue
        del tensors[key], made[key]
        for letter, factor in zip("AB", weight.factors(), strict=True):
            new = key.replace("lora_W", f"lora_{letter}")
            tensors[new], made[new] = factor, of._replace(weight=None)
        scales[without_prefix(path)] = 1.0
    return replace(state, tensors=tensors, made=made, scales=scales)


def _with_kernels(state: AdapterState, model: nn.Module) -> AdapterState:
    """`state` with factors of what is added to weights of convolutions, which have no room for
    weights of adapters' own."""
    places, scales = Places((), model), dict(state.scales)
    tensors, made = dict(state.tensors), dict(state.made)
    for key, of in state.made.items():
        path, weight = key.removesuffix(".lora_W.weight"), of.weight
        module = places.module(path)
        entry = None if module is None else lookup(module)
        if module is None or entry is None or entry.kind != "conv":
            continue
        if weight is None or not weight.adds or weight.bias is not None:
            continue
        shape = weight_shape(module)
        known = None not in (weight.out_features, weight.in_features)
        if not known or weight.why_not(shape[0], math.prod(shape[1:])):
            continue  # which is told with its place
        a, b, *_ = of_delta(weight.weight(weight.tensors[0].new_zeros(shape).flatten(1)), None)
        named = {"A": a.unflatten(1, shape[1:]), "B": b.reshape(*b.shape, *[1] * len(shape[2:]))}
        del tensors[key], made[key]
        for letter, tensor in named.items():
            new = key.replace("lora_W", f"lora_{letter}")
            tensors[new], made[new] = tensor, of._replace(weight=None)
        if state.config.lora_bias:
            tensors[key.replace("lora_W.weight", "lora_B.bias")] = b.new_zeros(len(b))
        scales[without_prefix(path)] = 1.0
    return replace(state, tensors=tensors, made=made, scales=scales)


@dataclass(frozen=True)
class InspectedModule:
    """The sizes of a module's factors, and s if known."""

    path: str
    sizes: FactorSizes
    scale: float | None


@dataclass(frozen=True)
class Inspected:
    """The contents of an adapter; `others` are keys that are not of factors."""

    where: str
    dialect: str
    tensors: int
    nbytes: int
    modules: tuple[InspectedModule, ...]
    features: tuple[str, ...]
    others: tuple[str, ...]
    base: str | None

    def lines(self) -> Iterator[str]:
        """The report without `modules`."""
        yield f"dialect: {self.dialect}"
        yield f"{self.tensors} tensors, {self.nbytes} bytes"
        if self.modules:
            ranks = sorted({row.sizes.rank for row in self.modules})
            yield f"{len(self.modules)} modules, rank {', '.join(map(str, ranks))}"
        if self.base:
            yield f"trained for {self.base}"
        yield from (f"feature: {feature}" for feature in self.features)
        yield from (f"not a LoRA factor: {key}" for key in self.others)


def inspected(source: Any) -> Inspected:
    """The contents of an adapter; raises as `load_state`."""
    state = with_factors(load_state(source))
    config, scales, tensors = state.config, state.scales, state.tensors
    rows = [
        InspectedModule(
            path, sizes, scales.get(path, config.scale(name, sizes.rank) if sizes.rank else None)
        )
        for saved, sizes in factor_sizes(tensors).items()
        for path in (without_prefix(saved),)
        for name in (state.paths.get(path, path),)
    ]
    return Inspected(
        state.where,
        state.dialect,
        len(tensors),
        sum(tensor.nbytes for tensor in tensors.values()),
        tuple(sorted(rows, key=lambda row: row.path)),
        tuple(_features(state)),
        tuple(key for key in tensors if parse(key) is None),
        config.base_model,
    )


def config_of(folder: Path) -> PeftConfig:
    """A folder's configuration in PEFT's terms; tensors of PEFT's LoRA are not read."""
    fields, where = raw_fields(folder)
    if not mlx.configures(fields):
        config = PeftConfig.read(fields, where=where, methods=True)
        if config.method is None:
            return config
    state = with_factors(load_state(folder))
    ranks = [sizes.rank for sizes in factor_sizes(state.tensors).values() if sizes.rank]
    return replace(state.config, r=max(ranks, default=None))


#: The meaning of each field of a configuration, if it is set.
_FEATURES = {
    "invocation": "aLoRA: active from the tokens [{}] on",
    "use_dora": "DoRA: outputs are rescaled (use_dora)",
    "lora_bias": "biases of B (lora_bias)",
    "use_rslora": "s = α/√r (use_rslora)",
    "rank_pattern": "ranks of single modules (rank_pattern)",
    "alpha_pattern": "α of single modules (alpha_pattern)",
    "target_parameters": "parameters: {} (target_parameters)",
    "modules_to_save": "whole weights: {} (modules_to_save)",
    "trainable_token_indices": "tokens of its own: {} (trainable_token_indices)",
}


def _features(state: AdapterState) -> Iterator[str]:
    for name, text in _FEATURES.items():
        value = getattr(state.config, name)
        if not is_off(value):
            yield text.format(", ".join(map(str, value)) if isinstance(value, tuple) else value)
    for method, low in dict.fromkeys((m.method, m.weight is None) for m in state.made.values()):
        what = "factors whose product is its ΔW" if low else "a weight of its own"
        yield f"{method}, read as {what}"
    if state.config.bias != "none":
        yield f"biases of its own (bias = {state.config.bias})"
    if any((factor := parse(key)) and factor.embedding for key in state.tensors):
        yield "factors of embeddings"
