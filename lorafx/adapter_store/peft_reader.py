"""Reading LoRA checkpoints: every saved tensor is placed, or an error names it.

All problems of a file are found before anything is raised, and nothing is changed by reading.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import nn

from lorafx.adapter_store.adapter import Adapter as Adapter
from lorafx.adapter_store.checkpoint import load_state
from lorafx.adapter_store.coverage import coverage
from lorafx.adapter_store.extras import rows_wanted
from lorafx.adapter_store.findings import Findings
from lorafx.adapter_store.peft_config import PeftConfig
from lorafx.adapter_store.peft_keys import factor_sizes, parse
from lorafx.adapter_store.places import ExpertPlace, Places
from lorafx.adapter_store.reading import Reading
from lorafx.config import LoraConfig
from lorafx.errors import CheckpointError, LorafxWarning
from lorafx.model.expert_names import unnested

if TYPE_CHECKING:
    from lorafx.model.sites import Site


class AdapterTargets(NamedTuple):
    """What an adapter asks of a model: module paths without prefixes, and its largest rank."""

    modules: tuple[str, ...]
    rank: int


def adapter_target_modules(source: Any, model: nn.Module) -> AdapterTargets:
    """The modules of `model` that an adapter's saved keys name, and its largest rank.

    Keys of routed experts name the parameters that they are of, and keys from before a module was
    renamed the module as it is called now.

    Raises CheckpointError (UnsupportedAdapterError for the configuration) as `read_adapter` does
    for what can be seen without the model; shapes and placement are checked there.
    """
    modules: dict[str, None] = {}
    rank = 0
    state, places = load_state(source, model), Places((), model)
    config, sizes = state.config, factor_sizes(state.tensors)
    for key, tensor in state.tensors.items():
        factor = parse(key)
        if factor is None:
            continue
        place = places.meaning(factor.module)
        rows = sizes[factor.module].rank
        if isinstance(place, ExpertPlace):
            modules.update(dict.fromkeys(_parameters(place, config)))
            rows = _rank_of(place, config, rows, tensor.dim())
        else:
            modules[places.current(factor.module)] = None
        rank = max(rank, rows if factor.letter == "A" else 0)
    if (not modules or not rank) and not any(rows_wanted(state, model)):
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
    """Read the adapter `source` and place every tensor on one of `sites`.

    Args:
        source: as `lorafx.adapter_store.checkpoint.load_state` takes it.
        name: what requests will call it.
        sites: the selected sites; keys may use any of their paths, the names of the parts of
            packed sites, and packed names of sites that are apart (`LoraConfig.packed_modules`).
        model: root module of `sites`. Saved copies of its base weights are compared with them.
        max_rank: largest rank that the banks hold.
        lora_config: what `sites` were selected by. Where that was what adapters target, modules
            that are no sites count among those that the adapter leaves out.
        strict: a module that counts, that the adapter's configuration targets and that the file has
            no factors for, is a problem too. Without it W stays W there, and one LorafxWarning says
            how many there are.
        warn: give that warning.

    Raises:
        UnsupportedAdapterError: the configuration, or a key, asks for arithmetic beyond LoRA.
        CapacityError: the only problems are a rank over `max_rank`, or no room for weights of the
            adapter's own.
        CheckpointError: anything else, all problems of the file at once.
    """
    state = load_state(source, model, warn=warn)
    findings = Findings(state, Places(sites, model), max_rank)
    reading = Reading(findings)
    weights = reading.run()
    left_out = coverage(reading, lora_config)
    if strict and left_out.missing:
        findings.problems.append(f"{left_out}; strict=True makes this an error")
    findings.raise_problems(name)
    if left_out.missing and warn:
        warnings.warn(
            f"adapter {name!r} in {state.where}: {left_out}. These modules keep the base "
            "weights, which is right if the adapter was trained on only a part of the "
            "model; otherwise the file is incomplete. strict=True makes this an error",
            LorafxWarning,
            stacklevel=2,
        )
    return Adapter(
        name,
        weights,
        findings.largest,
        state.where,
        spans=reading.spans,
        own=reading.own.found,
        notes=state.notes,
        replaces_biases=state.config.bias != "none",
        compared=findings.compared,
        invocation=state.config.invocation,
        keys={key: tensor.shape for key, tensor in state.tensors.items()},
    )


def _parameters(place: ExpertPlace, config: PeftConfig) -> list[str]:
    """The parameters of routed experts that a saved path names."""
    experts, saved = place.experts, unnested(place.saved)
    targeted = [w for w in experts.weights if config.targets_parameter(w.path(saved))]
    weights = [place.weight] if place.weight is not None else targeted or experts.weights
    return [weight.path(experts.path) for weight in weights]


def _rank_of(place: ExpertPlace, config: PeftConfig, rows: int, dims: int) -> int:
    """The rank of an A of `dims` dimensions with `rows` rows, which may be those of all experts."""
    if place.expert is not None or dims == 3:
        return rows
    configured = {config.r, *config.rank_pattern.values()} - {None} or {rows}
    stacked = place.weight is None or rows not in configured
    return max(rows // place.experts.count, 1) if stacked else rows
