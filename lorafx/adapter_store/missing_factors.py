"""Targeted modules for which a file has no factors.

They keep W. That is right for a language adapter whose `q_proj` also matches the vision tower, but
cannot be told from lost tensors. So there is a warning, or an error if `strict`, about the selected
sites and parts, or about all modules if adapters select them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import replace
from itertools import product

from torch import nn

from lorafx.adapter_store.reading import Reading
from lorafx.config import LoraConfig
from lorafx.model import targets
from lorafx.model.experts import PROJECTIONS, Columns, ExpertWeight, covers, overlapping
from lorafx.model.module_graph import join
from lorafx.registry import is_empty, lookup


class MissingFactors:
    """Finds targeted paths without factors."""

    def __init__(self, reading: Reading, selection: LoraConfig | None) -> None:
        self.reading, self.places, self.config = reading, reading.places, reading.config
        selection = selection or LoraConfig()
        #: Whether the adapters' targets select the sites, so that all modules may lack factors.
        self.by_adapters = isinstance(selection.target_modules, targets.AdapterNames)
        self.exclude = targets.checked(selection.exclude_modules, "exclude_modules")

    def paths(self) -> Iterator[str]:
        modules = dict(self._modules())
        yield from modules
        yield from self._packed({id(module) for module in modules.values()})
        yield from self._experts()

    def _is_expected(self, path: str, module: nn.Module | None) -> bool:
        """Whether a module that is no site, None for a packed name, should have factors."""
        if not self.by_adapters:
            return False
        entry = None if module is None else lookup(module)
        if module is not None and entry is None and not module._parameters:
            return False  # a container, which has no weight to keep
        if targets.is_all_linear(self.exclude):
            return entry is None or not entry.is_linear
        return self.exclude is None or not targets.names(self.exclude, [path])

    def _modules(self) -> Iterator[tuple[str, nn.Module]]:
        reading, config = self.reading, self.config
        named = {id(site.module) for item in reading.landings.values() for site, _ in item.places}
        named |= {id(module) for module in reading.unselected.values()} | reading.experts.modules
        sites = self.places.selected_modules()
        for path, module in self.places.named_modules():
            expected = id(module) in sites or self._is_expected(path, module)
            if id(module) in named or not expected or is_empty(module):
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
        for path, landing in self.places.packed_names().items():
            places = landing.places
            decoded = any(site.part_path(i) in reading.decoded for site, i in places)
            if landing.undeclared:
                whole = replace(landing, undeclared="").key
                decoded = landing.key in reading.landings or whole in reading.landings
            reported = all(id(site.module) in missing for site, _ in places)
            if decoded or reported or path in reading.unavailable:
                continue
            selected = any(site.parts[i].selected for site, i in places)
            if (selected or self._is_expected(path, None)) and self.config.matches(path):
                yield path

    def _experts(self) -> Iterator[str]:
        reading = self.reading.experts
        if not self.config.target_parameters and not reading.singly:
            return
        for path, module in self.places.named_modules():
            experts = self.places.experts_of(module, path)
            if experts is None or any(p.startswith(path) for p in self.reading.unavailable):
                continue
            for weight in experts.weights:
                weight_path = weight.path(path)
                touched = reading.touched.get((id(module), weight.name), set())
                if not (weight.name in experts.sites or self._is_expected(weight_path, module)):
                    continue
                if not self.config.targets_parameter(weight_path):
                    yield from self._projections(weight, path, touched)
                elif not touched:
                    yield weight_path

    def _projections(self, weight: ExpertWeight, path: str, touched: set[Columns]) -> Iterator[str]:
        """Projections of single experts, which PEFT gave factors before experts were fused."""
        known = set(touched)
        halves = [(name, half) for name in PROJECTIONS if (half := covers(weight, name))]
        for (name, half), expert in product(halves, range(weight.experts)):
            columns = {(h, expert) for h in overlapping(half)}
            if known.isdisjoint(columns) and self.config.matches(f"{path}.{expert}.{name}"):
                known.add((half, expert))
                yield f"{path}.{expert}.{name}"
