"""Reads LoRA checkpoints: every saved tensor is placed, or an error names it.

    ΔW = s · B A,  A (r, K), B (N, r);   embeddings: A (r, V), ΔE = s · (B A)ᵀ;   DoRA: m (N,)

All problems of a file are found before anything is raised, and reading changes nothing.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

from torch import nn

from lorafx.adapter_store.changed_weight import ChangedWeight
from lorafx.adapter_store.checkpoint import load_state, with_factors
from lorafx.adapter_store.extras import rows_wanted
from lorafx.adapter_store.findings import Findings
from lorafx.adapter_store.missing_factors import MissingFactors
from lorafx.adapter_store.peft_config import PeftConfig
from lorafx.adapter_store.peft_keys import factor_sizes
from lorafx.adapter_store.places import (
    ExpertPlace,
    Places,
)
from lorafx.adapter_store.reading import Reading, expert_parameters, rank_of_experts
from lorafx.adapter_store.stored import Adapter as Adapter
from lorafx.config import LoraConfig
from lorafx.errors import CheckpointError, LorafxWarning, some
from lorafx.model.bank import SharedPair
from lorafx.model.sites import Site


class AdapterTargets(NamedTuple):
    """An adapter's module paths without prefixes, and its largest rank."""

    modules: tuple[str, ...]
    rank: int


def adapter_target_modules(source: Any, model: nn.Module) -> AdapterTargets:
    """The modules of `model` that an adapter's keys name, by their current names, and its largest
    rank. Raises as `read_adapter`, but does not check shapes and places."""
    modules: dict[str, None] = {}
    rank = 0
    state, places = load_state(source, model), Places((), model)
    for path, sizes in factor_sizes(state.tensors).items():
        place, rows = places.meaning(path), sizes.rank
        if isinstance(place, ExpertPlace):
            modules.update(dict.fromkeys(expert_parameters(place, state.config)))
            rows = rank_of_experts(place, state.config, rows)
        else:
            modules[places.current(path)] = None
        rank = max(rank, rows)
    if not (modules and (rank or state.made)) and not any(rows_wanted(state, model)):
        raise CheckpointError(f"{state.where} holds no LoRA factors (lora_A, lora_B)")
    return AdapterTargets(tuple(modules), max(rank, 1))


def read_adapter(
    source: Any,
    name: str,
    sites: Sequence[Site],
    *,
    model: nn.Module,
    max_rank: int | None = None,
    lora_config: LoraConfig | None = None,
    strict: bool = False,
    warn: bool = True,
) -> Adapter:
    """Read the adapter `source`, as in `load_state`, and place every tensor on one of `sites`.

    Args:
        sites: the selected sites; keys may use any of their paths, names of parts of packed sites,
            and packed names of separate sites (`LoraConfig.packed_modules`).
        model: root module of `sites`, with whose weights saved copies are compared.
        max_rank: largest rank of the banks.
        lora_config: selected the `sites`. If it used adapters' targets, modules that are no sites
            can lack factors too.
        strict: a targeted module without factors, factors that are not used, and another class of
            model in the configuration are problems, not warnings.

    Raises:
        UnsupportedAdapterError: arithmetic beyond LoRA.
        CapacityError: all problems are of ranks over `max_rank` or room for replaced weights.
        CheckpointError: otherwise. The error has all problems of the file.
    """
    places = Places(sites, model)
    state = with_factors(load_state(source, model), partial(_pair_at, places))
    findings = Findings(state, places, max_rank)
    reading = Reading(findings)
    weights = reading.run()
    # The factors of a renamed module are not missing as well.
    search = () if reading.unknown else MissingFactors(reading, lora_config).paths()
    missing = tuple(dict.fromkeys(search))
    total = len(missing) + len(reading.landings) + len(reading.experts.paths)
    doubts = []
    if missing:
        share = 100 * len(missing) / (total or 1)
        doubts.append(
            f"its configuration targets {total} modules here, but its file has no factors for "
            f"{len(missing)} of them ({share:.0f} %): {some(missing, 8)}. These modules keep the "
            "base weights, which is right if the adapter was trained on only a part of the model; "
            "otherwise the file is incomplete"
        )
    if _is_of_another_class(state.config, model):
        doubts.append(
            f"it was trained on a {' of '.join(state.config.trained_class or ())}, and here is a "
            f"{type(model).__name__} without one, whose modules have its names; load it with the "
            "model that it was made for"
        )
    if state.lost:
        doubts.append(
            f"diffusers' conversion of its names leaves out {len(state.lost)} of its tensors: "
            f"{some(state.lost, 8)}. What they would change keeps the base weights; save the "
            "adapter under diffusers' names for the model"
        )
    if state.left_out:
        doubts.append(
            f"it has factors for other models of a pipeline too ({', '.join(state.left_out)}), "
            "which are not used here: load it into those as well, or say AdapterSource(..., "
            "component=...)"
        )
    if strict:
        findings.problems += [f"{doubt}; strict=True makes this an error" for doubt in doubts]
    findings.raise_problems(name)
    for doubt in doubts if warn else ():
        warnings.warn(
            f"adapter {name!r} in {state.where}: {doubt}. strict=True makes this an error",
            LorafxWarning,
            stacklevel=2,
        )
    return Adapter(
        name,
        weights,
        findings.largest,
        state.where,
        own_weights=reading.extras.own_weights,
        changed=reading.extras.changed,
        replaces_biases=state.config.bias != "none",
        compared=reading.compared,
        invocation=state.config.invocation,
    )


def _pair_at(places: Places, path: str, weight: ChangedWeight) -> SharedPair | None:
    """The pair of the site at a saved path, if it is that of `weight`."""
    module = places.module(path)
    site = None if module is None else places.site(module)
    if site is None or site.pair is None or weight.pair is None:
        return None
    rows = min(weight.rows(site.out_features, site.in_features), site.out_features)
    return site.pair if rows <= site.own_rows and site.pair.equals(weight.pair) else None


def _is_of_another_class(config: PeftConfig, model: nn.Module) -> bool:
    """Whether the configuration names a class of the same library that is not in the model."""
    if config.trained_class is None:
        return False
    name, module = config.trained_class
    classes = [cls for part in model.modules() for cls in type(part).__mro__]
    if any(cls.__name__ == name or cls.__module__ == module for cls in classes):
        return False
    return module.partition(".")[0] == type(model).__module__.partition(".")[0]
