"""What a saved path means among routed experts.

mlp.experts.3.gate_proj     the gate of expert 3
mlp.experts.gate_up_proj    the parameter, of all experts
mlp.experts                 a parameter that PEFT wrapped; the configuration and the shapes
mlp.experts.base_layer      tell which of the two
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import nn

from lorafx.adapter_store.peft_keys import without_compiled
from lorafx.model.expert_names import PROJECTIONS, Half, covers, parse, unnested
from lorafx.model.experts import ExpertWeight, saved_weights
from lorafx.registry import lookup

if TYPE_CHECKING:
    from lorafx.model.sites import Site


@dataclass(eq=False)
class Experts:
    """A module of routed experts.

    Attributes:
        path: its canonical path where a parameter is selected, else the one it was found by.
        module: the instance.
        weights: its two parameters in the order in which it registers them, which is the order
            in which PEFT wraps them. Their sizes are those that checkpoints have.
        sites: those that are selected, by the parameter's name.
    """

    path: str
    module: nn.Module
    weights: tuple[ExpertWeight, ...]
    sites: dict[str, Site] = field(default_factory=dict)

    @property
    def count(self) -> int:
        """E."""
        return self.weights[0].experts


@dataclass(frozen=True)
class ExpertPlace:
    """What a saved path means.

    Attributes:
        experts: the module.
        saved: the path without prefixes.
        weight: the parameter; None where PEFT's wrapper leaves it open.
        half: what is meant of its columns.
        expert: the index, None for all.
        nested: for a wrapper, whether it is the inner one of two.
        reason: why factors have no place here, "" where they have one.
    """

    experts: Experts
    saved: str
    weight: ExpertWeight | None = None
    half: Half = "all"
    expert: int | None = None
    nested: bool = False
    reason: str = ""


class ExpertPlaces:
    """Finds what a path means among the experts of `sites`, and of modules that `walk` reaches.

    `walk` gives the module at a path of the model, or None.
    """

    def __init__(self, sites: Iterable[Site], walk: Callable[[str], nn.Module | None]) -> None:
        self._walk = walk
        self._by_path: dict[str, Experts] = {}
        self._by_module: dict[int, Experts] = {}
        for site in sites:
            if site.expert_weight is None:
                continue
            paths = [without_compiled(path).rpartition(".")[0] for path in site.paths]
            found = self._of(site.module, paths[0])
            assert found is not None
            found.sites[site.expert_weight.name] = site
            self._by_path.update(dict.fromkeys(paths, found))

    @property
    def selected(self) -> list[Experts]:
        """The modules of which a parameter is selected."""
        return [found for found in self._by_module.values() if found.sites]

    def find(self, path: str, saved: str) -> ExpertPlace | None:
        """What `path` means; None where it has nothing to do with routed experts.

        `saved` is the path as it was saved, which `path` may be a newer name of.
        """
        nested = unnested(path)
        whole = self.at(nested)
        if whole is not None:
            return ExpertPlace(whole, saved, nested=nested != path)
        one = parse(path)
        if one is not None:
            found = self.at(one.module)
            return None if found is None else _place(found, saved, one.name, one.expert)
        module, _, name = path.rpartition(".")
        found = self.at(module)
        return None if found is None else _place(found, saved, name, None)

    def at(self, path: str) -> Experts | None:
        """The module of routed experts at `path`, selected or not."""
        found = self._by_path.get(path)
        if found is not None:
            return found
        module = self._walk(path)
        return None if module is None else self._of(module, path)

    def _of(self, module: nn.Module, path: str) -> Experts | None:
        if id(module) in self._by_module:
            return self._by_module[id(module)]
        entry = lookup(module)
        weights = saved_weights(module) if entry is None or entry.kind == "experts" else None
        if weights is None:
            return None
        order = list(module._parameters)
        ordered = tuple(sorted(weights, key=lambda weight: order.index(weight.name)))
        return self._by_module.setdefault(id(module), Experts(path, module, ordered))


def _place(found: Experts, saved: str, name: str, expert: int | None) -> ExpertPlace | None:
    """The place of a projection, or of a parameter by its own name."""
    for weight in found.weights:
        if name == weight.name:
            return ExpertPlace(found, saved, weight, expert=expert)
    if name not in PROJECTIONS:
        return None
    for weight in found.weights:
        half = covers(weight, name)
        if half is None:
            continue
        if name == "w13" and weight.halves == "interleaved":
            reason = (
                f"gate and up of {weight.name} are interleaved, and w13 may mean them so or one "
                f"after the other; save the factors as {weight.name}, or as w1 and w3"
            )
            return ExpertPlace(found, saved, weight, half, expert, reason=reason)
        return ExpertPlace(found, saved, weight, half, expert)
    reason = f"the experts here have no {name}: {', '.join(w.name for w in found.weights)}"
    return ExpertPlace(found, saved, None, expert=expert, reason=reason)
