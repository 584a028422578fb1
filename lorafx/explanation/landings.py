"""Which keys of an adapter's file are for a module."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import nn

from lorafx.adapter_store.checkpoint import load_state
from lorafx.adapter_store.expert_places import ExpertPlace
from lorafx.adapter_store.peft_keys import parse
from lorafx.adapter_store.places import Places, SavedMeaning, SiteLanding
from lorafx.errors import nearest
from lorafx.explanation.selection import Selection
from lorafx.model.sites import Site


class Landed(NamedTuple):
    """The keys of a file for one module, in PEFT's names with their shapes, and a note where there
    are none."""

    keys: tuple[str, ...]
    note: str = ""


def landed(source: Any, model: nn.Module, sites: tuple[Site, ...], found: Selection) -> Landed:
    """The keys of an adapter at `source` that are for what was found.

    Raises:
        CheckpointError, UnsupportedAdapterError: as `load_state`.
    """
    state, places = load_state(source, model, warn=False), Places(sites, model)
    keys: list[str] = []
    modules: dict[str, None] = {}
    for key, tensor in state.tensors.items():
        factor = parse(key)
        path = key.rpartition(".")[0] if factor is None else factor.module
        modules[places.current(path)] = None
        if _means(places.meaning(path), found):
            keys.append(f"{key} {tuple(tensor.shape)}")
    if keys:
        return Landed(tuple(keys))
    near = nearest(found.path, modules)
    return Landed((), f"none of its {len(state.tensors)} keys is for this module{near}")


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
