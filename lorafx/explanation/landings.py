"""Which keys of an adapter are for a module."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from torch import Size, nn

from lorafx.adapter_store.expert_places import ExpertPlace
from lorafx.adapter_store.peft_keys import parse
from lorafx.adapter_store.places import Places, SavedMeaning, SiteLanding
from lorafx.errors import nearest
from lorafx.explanation.selection import Selection
from lorafx.model.sites import Site


class Landed(NamedTuple):
    """The keys of an adapter for one module, in PEFT's names with their shapes, and a note where
    there are none."""

    keys: tuple[str, ...]
    note: str = ""


def landed(
    saved: Mapping[str, Size], model: nn.Module, sites: tuple[Site, ...], found: Selection
) -> Landed:
    """Those of the keys of an adapter, in PEFT's names, that are for what was found."""
    places = Places(sites, model)
    keys: list[str] = []
    modules: dict[str, None] = {}
    for key, shape in saved.items():
        factor = parse(key)
        path = key.rpartition(".")[0] if factor is None else factor.module
        modules[places.current(path)] = None
        if _means(places.meaning(path), found):
            keys.append(f"{key} {tuple(shape)}")
    if keys:
        return Landed(tuple(keys))
    near = nearest(found.path, modules)
    return Landed((), f"none of its {len(saved)} keys is for this module{near}")


def _means(meaning: SavedMeaning, found: Selection) -> bool:
    if isinstance(meaning, SiteLanding):
        return any(
            site is found.site and found.part in (None, part) for site, part in meaning.places
        )
    if isinstance(meaning, ExpertPlace):
        if meaning.experts.module is not found.module:
            return False
        site = found.site
        one = meaning.weight if site is not None else None
        return one is None or site is None or site.expert_weight == one
    return meaning is found.module
