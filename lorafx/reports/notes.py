"""What a prediction warns of: modules that carry no LoRA, shared weights, devices, room."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import nn

from lorafx.config import LoraConfig
from lorafx.errors import some
from lorafx.model.candidates import by_raw_weight
from lorafx.model.experts import expert_weights
from lorafx.model.module_graph import ModuleGraph, Owner, join, joined, shape_of
from lorafx.model.sites import Site
from lorafx.registry import lookup
from lorafx.reports.prediction import Note


def notes_of(
    graph: ModuleGraph,
    sites: Sequence[Site],
    config: LoraConfig,
    distinct: Sequence[int],
    warned: Iterable[str],
    unknown: str,
) -> tuple[Note, ...]:
    """Notes in the order in which they matter.

    Args:
        warned: what choosing the sites warned of: modules that cannot carry LoRA.
        distinct: numbers of adapters that the figures are for.
        unknown: why it is not known which siblings share an input; "" where it is.
    """
    return (
        *(Note("refused", (), text) for text in warned),
        *_devices(sites),
        *_packs(unknown),
        *_training(graph.root),
        *_not_selected(graph, sites),
        *_aliases(sites),
        *_tied(graph, sites),
        *_capacity(config, distinct),
    )


def _devices(sites: Sequence[Site]) -> list[Note]:
    found = list(dict.fromkeys(site.device for site in sites if site.device.type != "meta"))
    if len(found) < 2:
        return []
    where = ", ".join(map(str, found))
    return [Note("device", (), f"the sites lie on {where}; lorafx serves models on one device")]


def _packs(unknown: str) -> list[Note]:
    if not unknown:
        return []
    text = (
        "packs hold all siblings of one input size, which may be more than share an input: "
        f"{unknown}. Give explain(example_inputs=...) the arguments of a call"
    )
    return [Note("packs", (), text)]


def _training(root: nn.Module) -> list[Note]:
    if not root.training or all(site is root for site in root.modules()):
        return []
    return [Note("training", ("",), "the model is in training mode; call eval() for inference")]


def _not_selected(graph: ModuleGraph, sites: Sequence[Site]) -> list[Note]:
    """Modules that could carry LoRA and are no sites, those that are alike together."""
    taken = {id(site.module) for site in sites}
    carried = {
        id(getattr(site.module, name, None)) for site in sites for name in site.eligible.carries
    }
    alike: dict[tuple[str, type, bool], list[str]] = {}
    for path, module in graph.modules():
        if id(module) in taken or id(module) in carried:
            continue
        known = lookup(module) is not None or expert_weights(module) is not None
        if known or by_raw_weight(module) is not None:
            alike.setdefault((shape_of(path), type(module), known), []).append(path)
    return [
        Note(
            "not selected",
            tuple(paths),
            f"{joined(paths)} ({cls.__name__})"
            + ("" if known else ", a matrix of a class that is not registered: name it to have it"),
        )
        for (_, cls, known), paths in alike.items()
    ]


def _aliases(sites: Sequence[Site]) -> list[Note]:
    return [
        Note(
            "alias",
            site.paths,
            f"{site.path} is also {some(site.aliases)}: one module, with one delta",
        )
        for site in sites
        if site.aliases
    ]


def _tied(graph: ModuleGraph, sites: Sequence[Site]) -> list[Note]:
    """Weights of sites that other modules hold too."""
    own = {id(site.module): site for site in sites}
    notes = []
    for owners in graph.tied():
        of_sites = [one for one in owners if id(one.module) in own]
        others = [one for one in owners if one not in of_sites]
        if not of_sites or len({id(one.module) for one in owners}) < 2:
            continue
        if others:
            text = (
                f"{some(map(_name, of_sites))} is also {some(map(_name, others))}, where no "
                "delta is added"
            )
        else:
            text = f"{some(map(_name, of_sites))} are one weight; each has deltas of its own"
        notes.append(Note("tied", tuple(one.path for one in owners), text))
    return notes


def _capacity(config: LoraConfig, distinct: Sequence[int]) -> list[Note]:
    over = [count for count in distinct if count > config.max_adapters]
    if not over:
        return []
    text = (
        f"a batch may have {config.max_adapters} adapters at once; figures for more are for "
        f"LoraConfig(max_adapters={max(over)})"
    )
    return [Note("capacity", (), text)]


def _name(owner: Owner) -> str:
    return join(owner.path, owner.attribute)
