"""Which site, or which parts of sites, a path in a checkpoint means.

    model.layers.0.self_attn.o_proj    the site at this path, or at an alias of it
    model.layers.0.self_attn.q_proj    a part of the packed site model.layers.0.self_attn.qkv_proj
    model.layers.0.self_attn.qkv_proj  the sites q_proj, k_proj and v_proj, where they are apart
    model.layers.0.block_sparse_moe.gate   what is called model.layers.0.mlp.gate since

What a path means is a *landing*: parts of sites in the order of the saved B's rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from lorafx.adapter_store.expert_places import ExpertPlace, ExpertPlaces
from lorafx.adapter_store.old_names import OldNames
from lorafx.adapter_store.peft_keys import COMPILED, candidates, without_compiled
from lorafx.errors import nearest
from lorafx.model.packed_names import virtual_paths
from lorafx.model.partition import spans

if TYPE_CHECKING:
    from lorafx.model.sites import Membership, Site

#: A site and the number of one of its parts.
Place = tuple["Site", int]


@dataclass(frozen=True)
class SiteLanding:
    """What a saved path means.

    Attributes:
        places: the parts that the factors belong to, in the order of B's rows.
        saved: the path without prefixes under which they were found.
        loose: the name whose slices only B's rows can tell; `places` are all it may cover then.
        missing: why factors may not be placed here, "" where they may.
    """

    places: tuple[Place, ...]
    saved: str
    loose: str = ""
    missing: str = ""

    @property
    def key(self) -> tuple[object, ...]:
        """Equal for landings that mean the same."""
        return (self.loose, *((id(site), part) for site, part in self.places))

    def fitting(self, rows: Mapping[str, int]) -> tuple[Place, ...] | None:
        """The places that the factors cover; None where that cannot be told.

        `rows` are those of B under each of the site's loose names that an adapter has factors for:
        together the names have to partition the site's slices.
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


def saved_sizes(place: Place) -> tuple[int, int]:
    """(K, N) of a part as a checkpoint has it: of the whole module where it is sharded."""
    site, index = place
    part = site.parts[index]
    if site.eligible.sharding is None:
        return part.in_features, part.out_features
    in_features, sizes = site.eligible.sharding.saved_sizes(site.module)
    return in_features, sum(sizes[i] for i in part.slices)


class Places:
    """Finds what a saved path means among `sites`, or at least the module that it names.

    With the whole `model`, an attribute, a path that reaches a module which is not a selected site
    can be told from one that reaches nothing, and every alias path is known.
    """

    def __init__(self, sites: Sequence[Site], model: nn.Module | None) -> None:
        self.model = model
        self._old = OldNames(model)
        self.experts = ExpertPlaces(sites, self.walk)
        sites = [site for site in sites if site.expert_weight is None]
        self._by_path = {without_compiled(p): site for site in sites for p in site.paths}
        self._by_module = {id(site.module): site for site in sites}
        self._by_name: dict[str, list[Place]] = {}
        self._loose: dict[str, tuple[Site, str]] = {}
        self._members: dict[str, list[tuple[Membership, Site]]] = {}
        for site in sites:
            paths = [without_compiled(path) for path in site.paths]
            for index, part in enumerate(site.parts):
                if part.name:
                    for path in virtual_paths(paths, part.name):
                        self._by_name.setdefault(path, []).append((site, index))
            for name in site.loose_names:
                self._loose.update(dict.fromkeys(virtual_paths(paths, name), (site, name)))
            for membership in site.member_of:
                for path in virtual_paths(paths, membership.name):
                    self._members.setdefault(path, []).append((membership, site))
        self._names: list[str] | None = None

    @property
    def whole(self) -> bool:
        """Whether the whole model is known, not only its sites."""
        return self.model is not None

    def landing(self, path: str) -> SiteLanding | None:
        """What `path` means; None where it means no site and no part of one, or experts."""
        for candidate, saved in self._readings(path):
            found = self._by_path.get(candidate) or self._by_module.get(id(self.walk(candidate)))
            if found is not None:
                return _checked(tuple((found, i) for i in range(len(found.parts))), saved)
            if candidate in self._by_name:
                return _only(self._by_name[candidate], saved)
            if candidate in self._loose:
                site, name = self._loose[candidate]
                places = tuple((site, i) for i in range(len(site.parts)))
                closed = not_selected([name]) if name in site.closed_names else ""
                return SiteLanding(places, saved, name, closed)
            if candidate in self._members:
                return _joined(self._members[candidate], saved)
        return None

    def expert_landing(self, path: str) -> ExpertPlace | None:
        """What `path` means among routed experts; None where it has nothing to do with them."""
        found = (self.experts.find(*reading) for reading in self._readings(path))
        return next((place for place in found if place is not None), None)

    def module(self, path: str) -> nn.Module | None:
        """The module that `path` means, a site or not; None where there is none."""
        walked = (
            self._by_path[candidate].module if candidate in self._by_path else self.walk(candidate)
            for candidate, _ in self._readings(path)
        )
        return next((module for module in walked if module is not None), None)

    def named_modules(self) -> Iterable[tuple[str, nn.Module]]:
        """Every known module under its canonical path; only sites when the model is unknown."""
        if self.model is None:
            known = [(without_compiled(s.path), s.module) for s in self._by_module.values()]
            return known + [(found.path, found.module) for found in self.experts.selected]
        return ((without_compiled(path), module) for path, module in self.model.named_modules())

    def selected_modules(self) -> set[int]:
        """Identities of the modules that were selected, wholly or in part."""
        sites = self._by_module.values()
        found = {id(s.module) for s in sites if any(part.selected for part in s.parts)}
        return found | {id(experts.module) for experts in self.experts.selected}

    def packed_names(self) -> Iterator[tuple[str, str, tuple[Place, ...]]]:
        """(path, `Landing.loose`, places) of what parts of packed sites would be called unpacked,
        and the other way round."""
        for path, places in self._by_name.items():
            yield path, "", tuple(places)
        for path, (site, name) in self._loose.items():
            yield path, name, tuple((site, i) for i in range(len(site.parts)))
        for path, found in self._members.items():
            yield path, "", tuple((site, 0) for _, site in found)

    def nearest(self, path: str) -> str:
        """A message fragment with the existing module paths closest to `path`."""
        if self._names is None:
            self._names = [name for name, _ in self.named_modules() if name]
            self._names += [name for name, _, _ in self.packed_names()]
            self._names += [s.path for e in self.experts.selected for s in e.sites.values()]
        wanted = candidates(path)[0]
        # difflib takes milliseconds a hundred names: try those of the same last component first.
        last = wanted.rpartition(".")[2]
        alike = [name for name in self._names if name.rpartition(".")[2] == last]
        return nearest(wanted, alike) or nearest(wanted, self._names[:2000])

    def newer_name(self, path: str) -> str | None:
        """The path of the module that was renamed since `path` was saved; None where none was."""
        readings = list(self._readings(path))
        if any(self.walk(new) is not None for new, saved in readings if new == saved):
            return None
        return next((new for new, saved in readings if self.walk(new) is not None), None)

    def _readings(self, path: str) -> Iterator[tuple[str, str]]:
        """(path in the model, path as it was saved): as it stands, then by its newer name."""
        saved = candidates(path)
        yield from zip(saved, saved, strict=True)
        for candidate in saved:
            renamed = self._old.renamed(candidate)
            if renamed is not None:
                yield renamed, candidate

    def walk(self, path: str) -> nn.Module | None:
        """The module at `path`, wrappers of torch.compile left out of it; None if none."""
        node = self.model
        for part in path.split(".") if path else ():
            if node is None:
                return None
            while part not in node._modules and node._modules.get(COMPILED) is not None:
                node = node._modules[COMPILED]
                assert node is not None
            node = node._modules.get(part)
        return node


def _checked(places: tuple[Place, ...], saved: str) -> SiteLanding:
    closed = [site.part_path(i) for site, i in places if not site.parts[i].selected]
    closed += places[0][0].closed_names
    return SiteLanding(places, saved, missing=not_selected(closed) if closed else "")


def not_selected(names: Sequence[str]) -> str:
    """Why factors of these modules, or parts of modules, cannot be placed."""
    return (
        f"{', '.join(names)} exists but was not selected; add it to target_modules when compiling"
    )


def _only(places: list[Place], saved: str) -> SiteLanding:
    """The one part that has this name."""
    if len(places) == 1:
        return _checked(tuple(places), saved)
    owners = ", ".join(site.path for site, _ in places)
    return SiteLanding(
        tuple(places),
        saved,
        missing=f"it is packed in each of {owners}; packed_modules may leave it to one of them",
    )


def _joined(found: list[tuple[Membership, Site]], saved: str) -> SiteLanding:
    """Sites that one packed name stands for, in the order in which it packs them."""
    found = sorted(found, key=lambda item: item[0].index)
    places = tuple((site, i) for _, site in found for i in range(len(site.parts)))
    count = found[0][0].count
    if [membership.index for membership, _ in found] == list(range(count)):
        return SiteLanding(places, saved)
    names = ", ".join(site.path for _, site in found)
    return SiteLanding(
        places,
        saved,
        missing=f"it packs {count} modules, of which only {names} was selected; add it to "
        "target_modules when compiling",
    )
