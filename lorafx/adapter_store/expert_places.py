"""What a saved path means among routed experts.

mlp.experts.3.gate_proj     the gate of expert 3
mlp.experts.gate_up_proj    the parameter, of all experts
mlp.experts                 a parameter that PEFT wrapped; the configuration and the shapes
mlp.experts.base_layer      tell which of the two
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import nn

from lorafx.model.experts import NESTED, ExpertWeight, Half, meaning, saved_weights
from lorafx.model.saved_names import Walked, without_compiled

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
    """Finds what a name means among the experts of `sites`, and of modules that names lead to."""

    def __init__(self, sites: Iterable[Site]) -> None:
        self._by_module: dict[int, Experts] = {}
        for site in sites:
            if site.expert_weight is None:
                continue
            found = self.of(site.module, without_compiled(site.path).rpartition(".")[0])
            assert found is not None
            found.sites[site.expert_weight.name] = site

    @property
    def selected(self) -> list[Experts]:
        """The modules of which a parameter is selected."""
        return [found for found in self._by_module.values() if found.sites]

    def find(self, walked: Walked, saved: str) -> ExpertPlace | None:
        """What a name means that was walked as far as it led; None where it has nothing to do with
        routed experts. `saved` is the path as it was saved."""
        experts = self.of(walked.module, walked.path)
        if experts is None:
            return None
        if walked.rest in ((), (NESTED,)):
            return ExpertPlace(experts, saved, nested=bool(walked.rest))
        meant = meaning(experts.weights, walked.rest)
        if meant is None:
            return None
        return ExpertPlace(
            experts, saved, meant.weight, meant.half, meant.expert, reason=meant.wrong
        )

    def of(self, module: nn.Module, path: str) -> Experts | None:
        """The module of routed experts that `module` at `path` is, selected or not."""
        if id(module) in self._by_module:
            return self._by_module[id(module)]
        weights = saved_weights(module)
        if weights is None:
            return None
        order = list(module._parameters)
        ordered = tuple(sorted(weights, key=lambda weight: order.index(weight.name)))
        return self._by_module.setdefault(id(module), Experts(path, module, ordered))
