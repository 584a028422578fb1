"""Resolves saved paths to sites, parts of sites, or routed experts.

    model.layers.0.self_attn.o_proj    the site at this path, or at an alias of it
    model.layers.0.self_attn.q_proj    a part of the packed site model.layers.0.self_attn.qkv_proj
    model.layers.0.self_attn.qkv_proj  the separate sites q_proj, k_proj and v_proj
    model.layers.0.block_sparse_moe.gate   an older name of model.layers.0.mlp.gate
    mlp.experts.3.gate_proj            the gate of expert 3
    mlp.experts.gate_up_proj           the parameter, of all experts
    mlp.experts, mlp.experts.base_layer    a parameter in PEFT's wrapper, which the configuration
                                       and the shapes tell

A *landing* consists of parts of sites, in the order of the saved B's rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from torch import nn

from lorafx.adapter_store.peft_keys import candidates, without_prefix
from lorafx.errors import Setting
from lorafx.model.experts import NESTED, ExpertWeight, Half, meaning, saved_weights
from lorafx.model.packed_names import virtual_paths
from lorafx.model.saved_names import PREFIX, SavedNames, nearest_names, without_compiled
from lorafx.registry import lookup

if TYPE_CHECKING:
    from lorafx.model.sites import Membership, Site

TARGETS = Setting("target_modules", "target_modules when compiling")
_WEIGHT = ".weight"
#: A site and the index of a part.
SitePart = tuple["Site", int]


@dataclass(frozen=True)
class SiteLanding:
    """Parts of sites, in the order of B's rows, that the path `saved` means. `undeclared`: a name
    whose slices, among `places`, only B's rows tell. `reason`: why factors may not be here."""

    places: tuple[SitePart, ...]
    saved: str
    undeclared: str = ""
    reason: str = ""

    @property
    def key(self) -> tuple[object, ...]:
        return (self.undeclared, *((id(site), part) for site, part in self.places))


def saved_sizes(place: SitePart) -> tuple[int, int]:
    """(K, N) of a part in a checkpoint, where it is not sharded."""
    site, index = place
    part = site.parts[index]
    if site.eligible.sharding is None:
        return part.in_features, part.out_features
    in_features, sizes = site.eligible.sharding.saved_sizes(site.module)
    return in_features, sum(sizes[i] for i in part.slices)


@dataclass(eq=False)
class Experts:
    """Routed experts: both `weights` in registration order, selected `sites` by parameter."""

    path: str
    module: nn.Module
    weights: tuple[ExpertWeight, ...]
    sites: dict[str, Site] = field(default_factory=dict)

    @property
    def count(self) -> int:
        return self.weights[0].experts


@dataclass(frozen=True)
class ExpertPlace:
    """The meaning of the path `saved` among routed experts; `reason`: why it cannot have factors,
    or "".

    Attributes:
        weight: the parameter; None where PEFT's wrapper leaves it open.
        expert: the index, None for all.
        nested: whether it is the inner one of two wrappers.
    """

    experts: Experts
    saved: str
    weight: ExpertWeight | None = None
    half: Half = "all"
    expert: int | None = None
    nested: bool = False
    reason: str = ""


#: What a saved path may mean.
SavedMeaning = SiteLanding | ExpertPlace | nn.Module | None


class Places:
    """Resolves saved paths among the `sites` and modules of `model`."""

    def __init__(self, sites: Sequence[Site], model: nn.Module) -> None:
        self.model = model
        self._names = SavedNames(model)
        self._experts: dict[int, Experts] = {}
        for site in sites:
            if site.expert_weight is not None:
                path = without_compiled(site.path).rpartition(".")[0]
                experts = self.experts_of(site.module, path)
                assert experts is not None
                experts.sites[site.expert_weight.name] = site
        sites = [site for site in sites if site.expert_weight is None]
        self._by_module = {id(site.module): site for site in sites}
        self._packed = _packed(sites)
        self._meanings: dict[str, SavedMeaning] = {}
        self._known: list[str] | None = None

    def meaning(self, path: str) -> SavedMeaning:
        """The meaning of `path`; a returned module is neither a site nor routed experts."""
        if path not in self._meanings:
            meanings = (self._meaning(*reading) for reading in self._readings(path))
            self._meanings[path] = next((m for m in meanings if m is not None), None)
        return self._meanings[path]

    def _meaning(self, reading: str, saved: str) -> SavedMeaning:
        walked = self._names.walk(reading)
        site = None if walked.remaining else self._by_module.get(id(walked.module))
        if site is not None:
            return _landing(tuple((site, i) for i in range(len(site.parts))), saved)
        packed = self._packed.get(without_compiled(walked.full_path))
        if packed is not None:
            return replace(packed, saved=saved)
        experts = self.experts_of(walked.module, walked.path)
        if experts is not None and walked.remaining in ((), (NESTED,)):
            return ExpertPlace(experts, saved, nested=bool(walked.remaining))
        expert_meaning = None if experts is None else meaning(experts.weights, walked.remaining)
        if experts is None or expert_meaning is None:
            return None if walked.remaining else walked.module
        place = expert_meaning.weight, expert_meaning.half, expert_meaning.expert
        return ExpertPlace(experts, saved, *place, reason=expert_meaning.wrong)

    def experts_of(self, module: nn.Module, path: str) -> Experts | None:
        """`module` at `path` as routed experts, selected or not."""
        weights = None if id(module) in self._experts else saved_weights(module)
        if weights is not None:
            order = list(module._parameters)  # one that a parametrisation makes is not there
            if all(weight.name in order for weight in weights):
                weights = tuple(sorted(weights, key=lambda weight: order.index(weight.name)))
            self._experts[id(module)] = Experts(path, module, weights)
        return self._experts.get(id(module))

    def module(self, path: str) -> nn.Module | None:
        walked = self._names.walk(self.current(path))
        return None if walked.remaining else walked.module

    def configured_module(self, saved: str) -> tuple[str, int]:
        """The path in PEFT's configuration of the factors at `saved`, and how often PEFT adds their
        delta: `mha` for `mha.base_layer.out_proj`, a child whose factors `mha` carries."""
        wrapper, _, name = saved.rpartition(".")
        if wrapper.rpartition(".")[2] != NESTED:
            return saved, 1
        owner = wrapper.removesuffix(NESTED).rstrip(".")
        module = self.module(owner) if owner else self.model
        entry = None if module is None else lookup(module)
        times = None if entry is None else entry.carries.get(name)
        return (saved, 1) if times is None else (owner, times)

    def site(self, module: nn.Module) -> Site | None:
        return self._by_module.get(id(module))

    def current(self, path: str) -> str:
        """The model's name for the saved `path`; of an unknown path only prefixes are removed."""
        best, remaining = without_prefix(path), 2
        for reading, _ in self._readings(path):
            walked = self._names.walk(reading)
            if len(walked.remaining) < remaining:
                best, remaining = walked.full_path, len(walked.remaining)
            if not remaining:
                break
        return best

    def named_modules(self) -> Iterable[tuple[str, nn.Module]]:
        return ((without_compiled(path), module) for path, module in self.model.named_modules())

    def selected_modules(self) -> set[int]:
        sites = self._by_module.values()
        modules = {id(s.module) for s in sites if any(part.selected for part in s.parts)}
        return modules | {key for key, experts in self._experts.items() if experts.sites}

    def packed_names(self) -> Mapping[str, SiteLanding]:
        """The meanings of names of parts and of packed names, by path."""
        return self._packed

    def nearest(self, path: str) -> str:
        """A message fragment with the closest module paths."""
        if self._known is None:
            self._known = [name for name, _ in self.named_modules() if name]
            self._known += self._packed
            self._known += [s.path for e in self._experts.values() for s in e.sites.values()]
        return nearest_names(without_prefix(path), self._known)

    def _readings(self, path: str) -> Iterator[tuple[str, str]]:
        """Yields (path in the model, path as saved), first unchanged, then renamed."""
        known: dict[str, str] = {}
        if path.count(PREFIX) > 1:
            # PEFT inside PEFT: the outer factors are for weights that the inner ones change.
            yield from ((saved, saved) for saved in candidates(path))
            return
        for saved in candidates(path):
            for reading in self._names.readings(saved):
                if reading not in known:
                    known[reading] = saved
                    yield reading, saved
        for reading, saved in known.items():
            # Renamings apply to names of weights.
            newer = self._names.renamed(reading + _WEIGHT).removesuffix(_WEIGHT)
            if newer != reading:
                yield from ((name, saved) for name in self._names.readings(newer))


def _packed(sites: Sequence[Site]) -> dict[str, SiteLanding]:
    named: dict[str, list[SitePart]] = {}
    undeclared: dict[str, SiteLanding] = {}
    members: dict[str, list[tuple[Membership, Site]]] = {}
    for site in sites:
        paths = [without_compiled(path) for path in site.paths]
        places = tuple((site, i) for i in range(len(site.parts)))
        for place, part in zip(places, site.parts, strict=True):
            for path in virtual_paths(paths, part.name) if part.name else ():
                named.setdefault(path, []).append(place)
        for name in site.undeclared:
            landing = SiteLanding(places, "", undeclared=name)
            undeclared.update(dict.fromkeys(virtual_paths(paths, name), landing))
        for membership in site.member_of:
            for path in virtual_paths(paths, membership.name):
                members.setdefault(path, []).append((membership, site))
    packed = {path: _packed_landing(items) for path, items in members.items()}
    return packed | undeclared | {path: _part_landing(parts) for path, parts in named.items()}


def _landing(places: tuple[SitePart, ...], saved: str) -> SiteLanding:
    unselected = [site.part_path(i) for site, i in places if not site.parts[i].selected]
    return SiteLanding(places, saved, reason=not_selected(unselected) if unselected else "")


def not_selected(names: Sequence[str]) -> str:
    """Why factors of these modules, or parts of modules, cannot be placed."""
    return f"{', '.join(names)} exists but was not selected; add it to {TARGETS}"


def _part_landing(places: Sequence[SitePart]) -> SiteLanding:
    if len(places) == 1:
        return _landing(tuple(places), "")
    owners = ", ".join(site.path for site, _ in places)
    reason = f"it is packed in each of {owners}; assign it to one of them with packed_modules"
    return SiteLanding(tuple(places), "", reason=reason)


def _packed_landing(members: Sequence[tuple[Membership, Site]]) -> SiteLanding:
    members = sorted(members, key=lambda item: item[0].index)
    places = tuple((site, i) for _, site in members for i in range(len(site.parts)))
    count = members[0][0].count
    if [membership.index for membership, _ in members] == list(range(count)):
        return SiteLanding(places, "")
    names = ", ".join(site.path for _, site in members)
    reason = f"it packs {count} modules, but only {names} was selected; add the others to {TARGETS}"
    return SiteLanding(places, "", reason=reason)
