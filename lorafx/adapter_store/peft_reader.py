"""Reading PEFT LoRA checkpoints: every saved tensor is placed, or an error names it.

All problems of a file are found before anything is raised, and nothing is changed by reading.
What the tensors mean: lorafx.adapter_store.reading.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from torch import nn

from lorafx.adapter_store.checkpoint import AdapterState, load_state, peek_shapes
from lorafx.adapter_store.peft_keys import parse, without_prefix
from lorafx.adapter_store.places import Places
from lorafx.adapter_store.reading import LoraWeights, Reading
from lorafx.errors import CheckpointError

if TYPE_CHECKING:
    from lorafx.sites import Site


@dataclass(frozen=True)
class Adapter:
    """A decoded adapter.

    Attributes:
        name: what requests call it.
        weights: `Site.part_path` -> factors, which is the site's canonical path unless it comes
            packed; what the adapter does not touch is absent.
        rank: the largest rank of its sites.
        source: where it was read from, for messages.
    """

    name: str
    weights: dict[str, LoraWeights]
    rank: int
    source: str


class AdapterTargets(NamedTuple):
    """What an adapter asks of a model: module paths without prefixes, and its largest rank."""

    modules: tuple[str, ...]
    rank: int


def adapter_target_modules(source: str | os.PathLike[str] | AdapterState) -> AdapterTargets:
    """The modules that an adapter's saved keys name and its largest rank, without a model.

    Raises CheckpointError (UnsupportedAdapterError for the configuration) as `read_adapter` does
    for what can be seen without the model; shapes and placement are checked there.
    """
    modules: dict[str, None] = {}
    rank = 0
    for key, shape in peek_shapes(source).items():
        factor = parse(key)
        if factor is None:
            continue
        modules[without_prefix(factor.module)] = None
        if factor.letter == "A" and shape:
            rank = max(rank, shape[0])
    if not modules or not rank:
        raise CheckpointError(f"{_called(source)} holds no LoRA factors (lora_A, lora_B)")
    return AdapterTargets(tuple(modules), rank)


def read_adapter(
    source: str | os.PathLike[str] | AdapterState,
    name: str,
    sites: Sequence[Site],
    *,
    model: nn.Module | None = None,
    max_rank: int | None = None,
) -> Adapter:
    """Read the adapter in folder `source` and place every tensor on one of `sites`.

    Args:
        source: folder with adapter_config.json and adapter_model.safetensors (or .bin), or an
            `AdapterState` in memory.
        name: what requests will call it.
        sites: the selected sites; keys may use any of their paths, the names of the parts of
            packed sites, and packed names of sites that are apart (`LoraConfig.packed_modules`).
        model: root module of `sites`. With it, messages tell a module that is not selected from
            one that does not exist, saved copies of base weights are compared with the model's,
            and modules that the configuration targets but are no sites must have weights too.
        max_rank: largest rank that the banks hold.

    Raises:
        UnsupportedAdapterError: the configuration, or a key, asks for arithmetic beyond LoRA.
        CapacityError: the only problem is a rank over `max_rank`.
        CheckpointError: anything else, all problems of the file at once.
    """
    state = load_state(source)
    reading = Reading(state, Places(sites, model), max_rank)
    weights = reading.run()
    reading.raise_problems(name)
    rank = max(w.rank for w in weights.values())
    return Adapter(name, weights, rank, state.where)


def _called(source: str | os.PathLike[str] | AdapterState) -> str:
    return source.where if isinstance(source, AdapterState) else str(source)
