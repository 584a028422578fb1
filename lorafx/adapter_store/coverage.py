"""Modules that an adapter's configuration targets but its file has no factors for: they keep W.

An adapter of a model's language part targets `q_proj`, and the vision tower has a `q_proj` too; so
do layers, or an extra head, that were not trained. Such a file is correct, but a file that lost
tensors looks the same. So `read_adapter` warns, or raises with `strict`.

    selected by a LoraConfig    its sites, and the selected parts of them, are looked at
    selected by the adapters    every module of the model, but those that are excluded
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass

from torch import nn

from lorafx.adapter_store.peft_config import PeftConfig
from lorafx.adapter_store.places import Places
from lorafx.adapter_store.reading import Reading
from lorafx.config import LoraConfig
from lorafx.errors import some
from lorafx.model import targets
from lorafx.model.experts import PROJECTIONS, Columns, ExpertWeight, covers, overlapping
from lorafx.model.module_graph import ModuleGraph, join
from lorafx.model.packed_names import ATTRIBUTE, PackedNames
from lorafx.registry import is_empty, lookup


class Scope:
    """Which modules are looked at.

    Args:
        lora_config: what the sites were selected by; None for nothing but the sites.
    """

    def __init__(self, lora_config: LoraConfig | None) -> None:
        asked = None if lora_config is None else lora_config.target_modules
        #: Whether the adapters themselves were the selection, so that no module was left out of it.
        self.whole = isinstance(asked, targets.AdapterNames)
        self.packed_modules = None if lora_config is None else lora_config.packed_modules
        exclude = None if lora_config is None else lora_config.exclude_modules
        self._exclude = targets.checked(exclude, "exclude_modules")

    def module(self, path: str, module: nn.Module | None) -> bool:
        """Whether a module that is no site, or what one of its packed names means, counts."""
        if not self.whole:
            return False
        entry = None if module is None else lookup(module)
        if module is not None and entry is None and not module._parameters:
            return False  # a container, which has no weight to keep
        if targets.is_all_linear(self._exclude):
            return entry is None or not entry.is_linear
        return self._exclude is None or not targets.names(self._exclude, [path])


@dataclass(frozen=True)
class Coverage:
    """How much of what an adapter's configuration targets its file has factors for.

    Attributes:
        missing: paths that it has none for.
        placed: how many places it has factors for.
    """

    missing: tuple[str, ...]
    placed: int

    def __str__(self) -> str:
        total = len(self.missing) + self.placed
        return (
            f"its configuration targets {total} modules here, but its file has no factors "
            f"for {len(self.missing)} of them ({100 * len(self.missing) / total:.0f} %): "
            f"{some(self.missing, 8)}"
        )


def coverage(reading: Reading, scope: Scope) -> Coverage:
    """What the file of `reading`, which has run, leaves out."""
    if reading.unknown:
        return Coverage((), 0)  # the factors of a renamed module are not missing as well
    modules = dict(_modules(reading, scope))
    ids = {id(module) for module in modules.values()}
    missing = dict.fromkeys(modules)
    missing.update(dict.fromkeys(_packed(reading, scope, ids)))
    missing.update(dict.fromkeys(_experts(reading, scope)))
    return Coverage(tuple(missing), len(reading.landings) + len(reading.experts.paths))


def _modules(reading: Reading, scope: Scope) -> Iterator[tuple[str, nn.Module]]:
    """Modules, by their own paths, that PEFT would have given factors."""
    places, config = reading.places, reading.config
    got = {id(site.module) for item in reading.landings.values() for site, _ in item.places}
    got |= {id(module) for module in reading.unselected.values()} | reading.experts.modules
    sites = places.selected_modules()
    for path, module in places.named_modules():
        counts = id(module) in sites or scope.module(path, module)
        if id(module) in got or not counts or is_empty(module):
            continue
        matrices = (
            join(path, name)
            for name, parameter in (module._parameters.items() if config.target_parameters else ())
            if parameter is not None and parameter.dim() == 2
        )
        if config.matches(path) or any(map(config.targets_parameter, matrices)):
            yield path, module


def _packed(reading: Reading, scope: Scope, missing: Collection[int]) -> Iterator[str]:
    """Packed names, and names of what is packed, that PEFT would have given factors; without those
    that only say again what the `missing` modules do."""
    places = reading.places
    landed = {(id(item.places[0][0]), item.loose) for item in reading.landings.values()}
    known: set[str] = set()
    for path, loose, found in places.packed_names():
        known.add(path)
        if loose:
            got = not landed.isdisjoint((id(found[0][0]), name) for name in (loose, ""))
        else:
            got = any(site.part_path(i) in reading.decoded for site, i in found)
        if got or path in reading.closed or all(id(site.module) in missing for site, _ in found):
            continue
        selected = any(s.parts[i].selected and loose not in s.closed_names for s, i in found)
        if (selected or scope.module(path, None)) and reading.config.matches(path):
            yield path
    for path, module in _unselected_names(places, scope):
        new = path not in known and id(module) not in missing
        if new and scope.module(path, None) and reading.config.matches(path):
            yield path


def _unselected_names(places: Places, scope: Scope) -> Iterator[tuple[str, nn.Module]]:
    """(packed name or part's name, module) of all modules, for adapters that are the selection."""
    model = places.model
    if not scope.whole:
        return
    if not scope.packed_modules and not any(hasattr(m, ATTRIBUTE) for m in model.modules()):
        return  # names cost a walk over the parameters
    names = PackedNames(ModuleGraph(model), scope.packed_modules).named()
    yield from ((path, module) for path, module in names if lookup(module) is not None)


def _experts(reading: Reading, scope: Scope) -> Iterator[str]:
    """Parameters of routed experts that target_parameters names, and single experts by their older
    names, where the file has any."""
    config, own = reading.config, reading.experts
    if not config.target_parameters and not own.singly:
        return
    for path, module in reading.places.named_modules():
        experts = reading.places.experts.of(module, path)
        if experts is None or any(closed.startswith(path) for closed in reading.closed):
            continue
        for weight in experts.weights:
            whole, touched = weight.path(path), own.touched(experts, weight)
            if not (weight.name in experts.sites or scope.module(whole, module)):
                continue
            if not config.targets_parameter(whole):
                yield from _single(config, weight, path, touched)
            elif not touched:
                yield whole


def _single(
    config: PeftConfig, weight: ExpertWeight, path: str, touched: Collection[Columns]
) -> Iterator[str]:
    """The projections of single experts that PEFT would have given factors before experts were
    fused. Each has several names, of which a pattern may match all."""
    known = set(touched)
    for name in PROJECTIONS:
        half = covers(weight, name)
        if half is None:
            continue
        for expert in range(weight.experts):
            same = {(h, e) for h in overlapping(half) for e in (None, expert)}
            if known.isdisjoint(same) and config.matches(f"{path}.{expert}.{name}"):
                known.add((half, expert))
                yield f"{path}.{expert}.{name}"
