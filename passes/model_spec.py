"""What each pass over the model promises of the model that it leaves, as `passes/spec.py` does for
graphs."""

from __future__ import annotations

from operator import attrgetter

from lorafx.adapter_store.stored import Adapter
from lorafx.model.attachment import Attachment, marks_on
from lorafx.model.packing import PackedGroup
from lorafx.model.sites import Site
from lorafx.program.program import Preparation
from lorafx.program.promises import Promise

#: What promises are about.
_SITES, _ADAPTERS, _PACKS = attrgetter("sites"), attrgetter("adapters"), attrgetter("packed")


def _elsewhere(model: Preparation, site: Site) -> str:
    there = model.graph.find(
        site.path if site.expert_weight is None else site.path.rpartition(".")[0]
    )
    return "" if there is site.module else f"{site.path} leads to another"


def _of_no_site(model: Preparation, adapter: Adapter) -> str:
    parts = {site.part_path(index) for site in model.sites for index in range(len(site.parts))}
    strange = sorted(adapter.weights.keys() - parts)
    return f"{adapter.name} has some for {', '.join(strange)}" if strange else ""


def _attached(model: Preparation) -> Attachment:
    assert model.attachment is not None
    return model.attachment


def _unmarked(model: Preparation, site: Site) -> str:
    mark = _attached(model).marks.get(site.path)
    return "" if mark is not None and mark in marks_on(site.marked) else site.path


def _without_bank(model: Preparation, site: Site) -> str:
    attachment = _attached(model)
    homes = [group for group in attachment.groups if site in group.sites]
    if len(homes) != 1 or attachment.marks[site.path].bank is not homes[0].bank:
        return site.path
    group, columns = homes[0], homes[0].bank.B.shape[2]
    _, offsets, sizes = group.ranges(group.sites.index(site))
    fits = all(offset + size <= columns for offset, size in zip(offsets, sizes, strict=True))
    return "" if fits else f"{site.path} has columns up to {offsets[-1] + sizes[-1]} of {columns}"


def _not_loaded(model: Preparation, adapter: Adapter) -> str:
    store, groups = model.store, _attached(model).groups
    if store is None or adapter.name not in store:
        return f"{adapter.name} is not in the store"
    copy = store[adapter.name].host
    if copy is None:  # its files are read again
        return ""
    factors = [
        (groups[index].bank, item) for index, items in copy.factors.items() for item in items
    ]
    if len(factors) != len(adapter.weights):
        return f"{adapter.name} has {len(factors)} of {len(adapter.weights)}"
    fit = all(
        item.rank <= bank.max_rank and item.offset + item.B.shape[-1] <= bank.B.shape[2]
        for bank, item in factors
    )
    return "" if fit else f"{adapter.name} has some that do not fit"


def _unpacked(model: Preparation, packed: PackedGroup) -> str:
    marks = _attached(model).marks
    apart = [
        site.path
        for site in packed.group.sites
        if marks[site.path].weight is not packed.weight or marks[site.path].bias is not packed.bias
    ]
    return ", ".join(apart)


MODEL_PROMISES: tuple[Promise[Preparation], ...] = (
    Promise("each site's path leads to its module", _SITES, _elsewhere, "select"),
    Promise("each factor of an adapter is a site's", _ADAPTERS, _of_no_site, "read"),
    Promise("each site has its mark", _SITES, _unmarked, "attach"),
    Promise("each site has columns of one bank", _SITES, _without_bank, "attach"),
    Promise("each adapter is in the store, and fits the banks", _ADAPTERS, _not_loaded, "load"),
    Promise("the marks of packed sites take the pack", _PACKS, _unpacked, "pack_weights"),
)
