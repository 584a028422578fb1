"""Which site, which parts of sites, or which routed experts a path in a checkpoint means.

    model.layers.0.self_attn.o_proj    the site at this path, or at an alias of it
    model.layers.0.self_attn.q_proj    a part of the packed site model.layers.0.self_attn.qkv_proj
    model.layers.0.self_attn.qkv_proj  the sites q_proj, k_proj and v_proj, where they are apart
    model.layers.0.block_sparse_moe.gate   what is called model.layers.0.mlp.gate since
    mlp.experts.3.gate_proj            the gate of expert 3
    mlp.experts.gate_up_proj           the parameter, of all experts
    mlp.experts, mlp.experts.base_layer    a parameter that PEFT wrapped; the configuration and the
                                       shapes tell which

A *landing* is parts of sites in the order of the saved B's rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from torch import nn

from lorafx.adapter_store.peft_keys import candidates, without_prefix
from lorafx.errors import Setting
from lorafx.model.experts import NESTED, ExpertWeight, Half, meaning, saved_weights
from lorafx.model.packed_names import spans, virtual_paths
from lorafx.model.saved_names import PREFIX, SavedNames, Walked, nearest_names, without_compiled
from lorafx.registry import lookup

if TYPE_CHECKING:
    from lorafx.model.sites import Membership, Site

#: What messages call the setting that selects modules.
TARGETS = Setting("target_modules", "target_modules when compiling")
_WEIGHT = ".weight"
#: A site and the number of one of its parts.
SitePart = tuple["Site", int]


@dataclass(frozen=True)
class SiteLanding:
    """Parts of sites that a saved path means.

    Attributes:
        places: the parts, in the order of B's rows.
        saved: the path without prefixes.
        loose: the name whose slices only B's rows can tell; `places` are all it may cover then.
        missing: why factors may not be placed here, "" where they may.
    """

    places: tuple[SitePart, ...]
    saved: str
    loose: str = ""
    missing: str = ""

    @property
    def key(self) -> tuple[object, ...]:
        """Equal for landings that mean the same."""
        return (self.loose, *((id(site), part) for site, part in self.places))

    def fitting(self, rows: Mapping[str, int]) -> tuple[SitePart, ...] | None:
        """The places that the factors cover; None where that cannot be told.

        `rows` are those of B under the site's loose names, which together have to partition its
        slices.
        """
        if not self.loose:
            return self.places
        names = self.places[0][0].loose_names
        sizes = [saved_sizes(place)[1] for place in self.places]
        found = spans(sizes, [rows.get(name) for name in names])[names.index(self.loose)]
        if len(found) != 1:
            return None
        ((start, end),) = found
        return self.places[start:end]


def saved_sizes(place: SitePart) -> tuple[int, int]:
    """(K, N) of a part as a checkpoint has it: of the whole module where it is sharded."""
    site, index = place
    part = site.parts[index]
    if site.eligible.sharding is None:
        return part.in_features, part.out_features
    in_features, sizes = site.eligible.sharding.saved_sizes(site.module)
    return in_features, sum(sizes[i] for i in part.slices)


@dataclass(eq=False)
class Experts:
    """A module of routed experts. Its two `weights` are in the order in which it registers them,
    and PEFT wraps them, with the sizes that checkpoints have. `sites` are the selected ones, by the
    parameter's name."""

    path: str
    module: nn.Module
    weights: tuple[ExpertWeight, ...]
    sites: dict[str, Site] = field(default_factory=dict)

    @property
    def count(self) -> int:
        return self.weights[0].experts


@dataclass(frozen=True)
class ExpertPlace:
    """What a saved path means among routed experts.

    Attributes:
        saved: the path without prefixes.
        weight: the parameter; None where PEFT's wrapper leaves it open.
        half: what is meant of its columns.
        expert: the index, None for all.
        nested: whether it is the inner one of two wrappers.
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
        """What a name means that was walked as far as it led; None where that is no experts."""
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


#: Of a saved path.
SavedMeaning = SiteLanding | ExpertPlace | nn.Module | None


class Places:
    """Finds what saved paths mean among the `sites` of `model`, or at least which modules they
    name."""

    def __init__(self, sites: Sequence[Site], model: nn.Module) -> None:
        self.model = model
        self._names = SavedNames(model)
        self.experts = ExpertPlaces(sites)
        sites = [site for site in sites if site.expert_weight is None]
        self._by_module = {id(site.module): site for site in sites}
        self._packed = _packed(sites)
        self._meanings: dict[str, SavedMeaning] = {}
        self._known: list[str] | None = None

    def meaning(self, path: str) -> SavedMeaning:
        """What `path` means; a module that it returns is neither a site nor routed experts."""
        if path not in self._meanings:
            readings = (self._meaning(*reading) for reading in self._readings(path))
            self._meanings[path] = next((found for found in readings if found is not None), None)
        return self._meanings[path]

    def _meaning(self, reading: str, saved: str) -> SavedMeaning:
        walked = self._names.walk(reading)
        site = None if walked.rest else self._by_module.get(id(walked.module))
        if site is not None:
            return _checked(tuple((site, i) for i in range(len(site.parts))), saved)
        packed = self._packed.get(without_compiled(walked.whole))
        if packed is not None:
            return replace(packed, saved=saved)
        place = self.experts.find(walked, saved)
        return walked.module if place is None and not walked.rest else place

    def module(self, path: str) -> nn.Module | None:
        walked = self._names.walk(self.current(path))
        return None if walked.rest else walked.module

    def carried(self, saved: str) -> tuple[str, int]:
        """The module to which a configuration gave the factors saved at `saved`, and how often
        PEFT adds their delta: `mha.base_layer.out_proj` has those of a child that `mha` carries
        (`Eligible.carries`); other paths have their own, once."""
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
        """What the model calls what was saved as `path`. It may be a packed name beside a module;
        where it leads nowhere, it is the path without prefixes."""
        best, left = without_prefix(path), 2
        for reading, _ in self._readings(path):
            walked = self._names.walk(reading)
            if len(walked.rest) < left:
                best, left = walked.whole, len(walked.rest)
            if not left:
                break
        return best

    def named_modules(self) -> Iterable[tuple[str, nn.Module]]:
        """Every module under its canonical path."""
        return ((without_compiled(path), module) for path, module in self.model.named_modules())

    def selected_modules(self) -> set[int]:
        """Identities of the modules that were selected, wholly or in part."""
        sites = self._by_module.values()
        found = {id(s.module) for s in sites if any(part.selected for part in s.parts)}
        return found | {id(experts.module) for experts in self.experts.selected}

    def packed_names(self) -> Iterator[tuple[str, str, tuple[SitePart, ...]]]:
        """(path, `SiteLanding.loose`, places) of what parts of packed sites would be called
        unpacked, and the other way round."""
        return ((path, found.loose, found.places) for path, found in self._packed.items())

    def nearest(self, path: str) -> str:
        """A message fragment with the existing module paths closest to `path`."""
        if self._known is None:
            self._known = [name for name, _ in self.named_modules() if name]
            self._known += self._packed
            self._known += [s.path for e in self.experts.selected for s in e.sites.values()]
        return nearest_names(without_prefix(path), self._known)

    def _readings(self, path: str) -> Iterator[tuple[str, str]]:
        """(path in the model, path as it was saved): as it stands, then by its newer name."""
        known: dict[str, str] = {}
        if path.count(PREFIX) > 1:
            # Of PEFT around PEFT: the outer factors are for weights that inner ones have changed.
            yield from ((saved, saved) for saved in candidates(path))
            return
        for saved in candidates(path):
            for reading in self._names.readings(saved):
                if reading not in known:
                    known[reading] = saved
                    yield reading, saved
        for reading, saved in known.items():
            # Renamings are for the names of weights: a path may become that of a parameter.
            newer = self._names.renamed(reading + _WEIGHT).removesuffix(_WEIGHT)
            if newer != reading:
                yield from ((name, saved) for name in self._names.readings(newer))


def _packed(sites: Sequence[Site]) -> dict[str, SiteLanding]:
    named: dict[str, list[SitePart]] = {}
    loose: dict[str, SiteLanding] = {}
    members: dict[str, list[tuple[Membership, Site]]] = {}
    for site in sites:
        paths = [without_compiled(path) for path in site.paths]
        places = tuple((site, i) for i in range(len(site.parts)))
        for place, part in zip(places, site.parts, strict=True):
            for path in virtual_paths(paths, part.name) if part.name else ():
                named.setdefault(path, []).append(place)
        for name in site.loose_names:
            closed = not_selected([name]) if name in site.closed_names else ""
            found = SiteLanding(places, "", name, closed)
            loose.update(dict.fromkeys(virtual_paths(paths, name), found))
        for membership in site.member_of:
            for path in virtual_paths(paths, membership.name):
                members.setdefault(path, []).append((membership, site))
    joined = {path: _joined(found) for path, found in members.items()}
    return joined | loose | {path: _only(found) for path, found in named.items()}


def _checked(places: tuple[SitePart, ...], saved: str) -> SiteLanding:
    closed = [site.part_path(i) for site, i in places if not site.parts[i].selected]
    closed += places[0][0].closed_names
    return SiteLanding(places, saved, missing=not_selected(closed) if closed else "")


def not_selected(names: Sequence[str]) -> str:
    """Why factors of these modules, or parts of modules, cannot be placed."""
    return f"{', '.join(names)} exists but was not selected; add it to {TARGETS}"


def _only(places: Sequence[SitePart]) -> SiteLanding:
    if len(places) == 1:
        return _checked(tuple(places), "")
    owners = ", ".join(site.path for site, _ in places)
    missing = f"it is packed in each of {owners}; assign it to one of them with packed_modules"
    return SiteLanding(tuple(places), "", missing=missing)


def _joined(found: Sequence[tuple[Membership, Site]]) -> SiteLanding:
    found = sorted(found, key=lambda item: item[0].index)
    places = tuple((site, i) for _, site in found for i in range(len(site.parts)))
    count = found[0][0].count
    if [membership.index for membership, _ in found] == list(range(count)):
        return SiteLanding(places, "")
    names = ", ".join(site.path for _, site in found)
    missing = (
        f"it packs {count} modules, but only {names} was selected; add the others to {TARGETS}"
    )
    return SiteLanding(places, "", missing=missing)
