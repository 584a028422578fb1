"""Reads LoRA checkpoints: every saved tensor is placed, or an error names it.

All problems of a file are found before anything is raised, and reading changes nothing.

Targeted modules without factors keep W: correct for a language adapter whose `q_proj` also matches
the vision tower, but indistinguishable from lost tensors. So there is a warning, or an error if
`strict`. It covers the selected sites and parts, or, if adapters were the selection, every module.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator, Sequence
from itertools import product
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import nn

from lorafx.adapter_store.checkpoint import load_state
from lorafx.adapter_store.extras import rows_wanted
from lorafx.adapter_store.findings import Findings
from lorafx.adapter_store.peft_config import PeftConfig
from lorafx.adapter_store.peft_keys import factor_sizes, parse
from lorafx.adapter_store.places import ExpertPlace, Places
from lorafx.adapter_store.reading import Reading
from lorafx.adapter_store.stored import Adapter as Adapter
from lorafx.config import LoraConfig
from lorafx.errors import CheckpointError, LorafxWarning, some
from lorafx.model import targets
from lorafx.model.experts import PROJECTIONS, Columns, ExpertWeight, covers, overlapping, unnested
from lorafx.model.module_graph import ModuleGraph, join
from lorafx.model.packed_names import ATTRIBUTE, PackedNames
from lorafx.registry import is_empty, lookup

if TYPE_CHECKING:
    from lorafx.model.sites import Site


class AdapterTargets(NamedTuple):
    """An adapter's module paths without prefixes, and its largest rank."""

    modules: tuple[str, ...]
    rank: int


def adapter_target_modules(source: Any, model: nn.Module) -> AdapterTargets:
    """The modules of `model` that an adapter's keys name, under current names, and its largest
    rank. Raises as `read_adapter`, except for shapes and placement."""
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
) -> Adapter:
    """Read the adapter `source`, as in `load_state`, and place every tensor on one of `sites`.

    Args:
        sites: the selected sites; keys may use any of their paths, names of parts of packed sites,
            and packed names of separate sites (`LoraConfig.packed_modules`).
        model: root module of `sites`, with whose weights saved copies are compared.
        max_rank: largest rank of the banks.
        lora_config: the selection of `sites`. If adapters' targets were the selection, modules that
            are no sites count as left out too.
        strict: a targeted module without factors is a problem, not a warning.

    Raises:
        UnsupportedAdapterError: arithmetic beyond LoRA.
        CapacityError: only ranks over `max_rank`, or no room for replaced weights.
        CheckpointError: anything else, all problems of the file at once.
    """
    state = load_state(source, model)
    findings = Findings(state, Places(sites, model), max_rank)
    reading = Reading(findings)
    weights = reading.run()
    missing = () if reading.unknown else tuple(dict.fromkeys(_Search(reading, lora_config).run()))
    total = len(missing) + len(reading.landings) + len(reading.experts.paths)
    left_out = (
        f"its configuration targets {total} modules here, but its file has no factors for "
        f"{len(missing)} of them ({100 * len(missing) / (total or 1):.0f} %): {some(missing, 8)}"
    )
    if strict and missing:
        findings.problems.append(f"{left_out}; strict=True makes this an error")
    findings.raise_problems(name)
    if missing:
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
        own=reading.extras.own,
        notes=state.notes,
        replaces_biases=state.config.bias != "none",
        invocation=state.config.invocation,
        keys={key: tensor.shape for key, tensor in state.tensors.items()},
    )


def _parameters(place: ExpertPlace, config: PeftConfig) -> list[str]:
    experts, saved = place.experts, unnested(place.saved)
    targeted = [w for w in experts.weights if config.targets_parameter(w.path(saved))]
    weights = [place.weight] if place.weight is not None else targeted or experts.weights
    return [weight.path(experts.path) for weight in weights]


def _rank_of(place: ExpertPlace, config: PeftConfig, rows: int, dims: int) -> int:
    if place.expert is not None or dims == 3:
        return rows
    configured = {config.r, *config.rank_pattern.values()} - {None} or {rows}
    stacked = place.weight is None or rows not in configured
    return max(rows // place.experts.count, 1) if stacked else rows


class _Search:
    """Targeted paths without factors. The factors of a renamed module are not missing as well."""

    def __init__(self, reading: Reading, selection: LoraConfig | None) -> None:
        self.reading, self.places, self.config = reading, reading.places, reading.config
        selection = selection or LoraConfig()
        #: Whether the adapters were the selection, so that no module was left out of it.
        self.whole = isinstance(selection.target_modules, targets.AdapterNames)
        self.packed_modules = selection.packed_modules
        self.exclude = targets.checked(selection.exclude_modules, "exclude_modules")

    def run(self) -> Iterator[str]:
        modules = dict(self._modules())
        yield from modules
        yield from self._packed({id(module) for module in modules.values()})
        yield from self._experts()

    def _counts(self, path: str, module: nn.Module | None) -> bool:
        """Whether a module that is no site, or a module of a packed name, counts."""
        if not self.whole:
            return False
        entry = None if module is None else lookup(module)
        if module is not None and entry is None and not module._parameters:
            return False  # a container, which has no weight to keep
        if targets.is_all_linear(self.exclude):
            return entry is None or not entry.is_linear
        return self.exclude is None or not targets.names(self.exclude, [path])

    def _modules(self) -> Iterator[tuple[str, nn.Module]]:
        reading, config = self.reading, self.config
        got = {id(site.module) for item in reading.landings.values() for site, _ in item.places}
        got |= {id(module) for module in reading.unselected.values()} | reading.experts.modules
        sites = self.places.selected_modules()
        for path, module in self.places.named_modules():
            counts = id(module) in sites or self._counts(path, module)
            if id(module) in got or not counts or is_empty(module):
                continue
            parameters = module._parameters.items() if config.target_parameters else ()
            matrices = (
                join(path, name) for name, p in parameters if p is not None and p.dim() == 2
            )
            if config.matches(path) or any(map(config.targets_parameter, matrices)):
                yield path, module

    def _packed(self, missing: Collection[int]) -> Iterator[str]:
        """Packed names that PEFT would have given factors, beyond the `missing` modules."""
        reading = self.reading
        landed = {(id(item.places[0][0]), item.loose) for item in reading.landings.values()}
        known: set[str] = set()
        for path, loose, found in self.places.packed_names():
            known.add(path)
            if loose:
                got = not landed.isdisjoint((id(found[0][0]), name) for name in (loose, ""))
            else:
                got = any(site.part_path(i) in reading.decoded for site, i in found)
            said = all(id(site.module) in missing for site, _ in found)
            if got or said or path in reading.closed:
                continue
            selected = any(s.parts[i].selected and loose not in s.closed_names for s, i in found)
            if (selected or self._counts(path, None)) and self.config.matches(path):
                yield path
        for path, module in self._unselected_names():
            new = path not in known and id(module) not in missing
            if new and self._counts(path, None) and self.config.matches(path):
                yield path

    def _unselected_names(self) -> Iterator[tuple[str, nn.Module]]:
        """(packed name or part's name, module) of all modules, if adapters are the selection."""
        model = self.places.model
        declared = self.packed_modules or any(hasattr(m, ATTRIBUTE) for m in model.modules())
        if not self.whole or not declared:
            return  # names cost a walk over the parameters
        names = PackedNames(ModuleGraph(model), self.packed_modules).named()
        yield from ((path, module) for path, module in names if lookup(module) is not None)

    def _experts(self) -> Iterator[str]:
        found = self.reading.experts
        if not self.config.target_parameters and not found.singly:
            return
        for path, module in self.places.named_modules():
            experts = self.places.experts_of(module, path)
            if experts is None or any(closed.startswith(path) for closed in self.reading.closed):
                continue
            for weight in experts.weights:
                whole, touched = weight.path(path), found.touched(experts, weight)
                if not (weight.name in experts.sites or self._counts(whole, module)):
                    continue
                if not self.config.targets_parameter(whole):
                    yield from self._single(weight, path, set(touched))
                elif not touched:
                    yield whole

    def _single(self, weight: ExpertWeight, path: str, known: set[Columns]) -> Iterator[str]:
        """Single experts' projections that PEFT gave factors before experts were fused."""
        halves = [(name, half) for name in PROJECTIONS if (half := covers(weight, name))]
        for (name, half), expert in product(halves, range(weight.experts)):
            alike = {(h, e) for h in overlapping(half) for e in (None, expert)}
            if known.isdisjoint(alike) and self.config.matches(f"{path}.{expert}.{name}"):
                known.add((half, expert))
                yield f"{path}.{expert}.{name}"
