"""Reading PEFT LoRA checkpoints: every saved tensor is placed, or an error names it.

Modules that the configuration targets and the file has nothing for: see `coverage`.

All problems of a file are found before anything is raised, and nothing is changed by reading.
What the tensors mean: lorafx.adapter_store.reading.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Size, nn

from lorafx.adapter_store.checkpoint import load_state
from lorafx.adapter_store.coverage import Scope, coverage
from lorafx.adapter_store.expert_places import ExpertPlace
from lorafx.adapter_store.findings import Findings
from lorafx.adapter_store.lora_weights import LoraWeights
from lorafx.adapter_store.own_reading import rows_wanted
from lorafx.adapter_store.peft_config import PeftConfig
from lorafx.adapter_store.peft_keys import factor_sizes, parse
from lorafx.adapter_store.places import Places
from lorafx.adapter_store.reading import Reading
from lorafx.config import LoraConfig
from lorafx.errors import CheckpointError, LorafxWarning
from lorafx.model.bank import OwnWeight
from lorafx.model.experts import unnested

if TYPE_CHECKING:
    from lorafx.model.sites import Site


@dataclass(frozen=True)
class Adapter:
    """A decoded adapter.

    Attributes:
        name: what requests call it.
        weights: `Site.part_path` -> factors, which is the site's canonical path unless it comes
            packed; what the adapter does not touch is absent.
        rank: the largest rank that it was trained with anywhere.
        source: where it was read from, for messages.
        spans: path of a name of a packed module -> the slices that its rows say it covers, where
            that is not declared.
        own: path of a site -> the rows of its weight that the adapter has of its own.
        notes: what was decided while it was read, a line each.
        replaces_biases: it was trained with biases in the place of the base's, of which those are
            kept that differ from the model's.
        invocation: the tokens from which on it is active (aLoRA); empty where it always is.
        compared: its file holds copies of base weights, which were compared with the model's.
        keys: its keys, in PEFT's names, with the shapes of their tensors.
    """

    name: str
    weights: dict[str, LoraWeights]
    rank: int
    source: str
    spans: Mapping[str, range] = field(default_factory=dict)
    own: Mapping[str, OwnWeight] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    replaces_biases: bool = False
    compared: bool = False
    invocation: tuple[int, ...] = ()
    keys: Mapping[str, Size] = field(default_factory=dict)

    @property
    def magnitudes(self) -> tuple[str, ...]:
        """The parts whose outputs it rescales (DoRA)."""
        return tuple(p for p, weights in self.weights.items() if weights.magnitude is not None)


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
        for path in _named_by(places, config, factor.module):
            modules[path] = None
        if factor.letter == "A":
            rows = sizes[factor.module].rank
            rank = max(rank, _rank_of(places, config, factor.module, rows, tensor.dim()))
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
    left_out = coverage(reading, Scope(lora_config))
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


def _named_by(places: Places, config: PeftConfig, path: str) -> list[str]:
    """What `path` names: the parameters of experts, or one module."""
    place = places.meaning(path)
    if not isinstance(place, ExpertPlace):
        return [places.current(path)]
    experts, saved = place.experts, unnested(place.saved)
    targeted = [w for w in experts.weights if config.targets_parameter(w.path(saved))]
    weights = [place.weight] if place.weight is not None else targeted or experts.weights
    return [weight.path(experts.path) for weight in weights]


def _rank_of(places: Places, config: PeftConfig, path: str, rows: int, dims: int) -> int:
    """The rank of an A of `dims` dimensions with `rows` rows: those of experts may be stacked."""
    place = places.meaning(path)
    if not isinstance(place, ExpertPlace) or place.expert is not None or dims == 3:
        return rows
    said = {rows} if config.max_rank is None else set(_ranks(config))
    stacked = place.weight is None or rows not in said
    return max(rows // place.experts.count, 1) if stacked else rows


def _ranks(config: PeftConfig) -> Iterator[int]:
    yield from config.rank_pattern.values()
    if config.r is not None:
        yield config.r
