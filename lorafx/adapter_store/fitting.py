"""From an adapter as its file has it to what the banks take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from lorafx.adapter_store.dora import measure
from lorafx.adapter_store.stored import (
    BankPlace,
    StoredAdapter,
    all_factors,
    host_copy,
    misfit,
    sharing,
)
from lorafx.errors import CapacityError, CheckpointError, nearest
from lorafx.model.bank import Factors

if TYPE_CHECKING:
    from lorafx.adapter_store.peft_reader import Adapter
    from lorafx.adapter_store.reading import LoraWeights
    from lorafx.model.sites import Group


def fitted(
    adapter: Adapter, places: Mapping[str, BankPlace], groups: Sequence[Group], max_rank: int
) -> StoredAdapter:
    """`adapter` in the dtype and layout of the banks of `groups`; `places` are theirs by path.

    Raises:
        CapacityError: its rank is over `max_rank`, or the banks have no room for DoRA.
        CheckpointError: sites, shapes, or values beyond the banks' dtype.
    """
    if adapter.rank > max_rank:
        raise CapacityError(
            f"adapter {adapter.name!r} has rank {adapter.rank}, over max_rank = "
            f"{max_rank}; compile with LoraConfig(max_rank={adapter.rank})"
        )
    if adapter.magnitudes and all(group.bank.gains is None for group in groups):
        raise CapacityError(
            f"adapter {adapter.name!r} is a DoRA adapter, for which the banks have no "
            "room; compile with LoraConfig(use_dora=True), or give the adapter when "
            "compiling"
        )
    factors: dict[int, list[Factors]] = {}
    problems: list[str] = []
    for path, weights in adapter.weights.items():
        place = places.get(path)
        if place is None:
            problems.append(f"{path} is not a site{nearest(path, places)}")
            continue
        problem = misfit(path, place, weights, max_rank)
        if problem:
            problems.append(problem)
            continue
        made = sharing(_factors(place, weights, groups), factors.get(place.group, ()))
        factors.setdefault(place.group, []).append(made)
        if not all(bool(torch.isfinite(t).all()) for t in (made.A, made.B)):
            problems.append(f"{path}: values beyond the range of {made.A.dtype}")
    if problems:
        raise CheckpointError(
            f"adapter {adapter.name!r} from {adapter.source} does not fit the banks:\n"
            + "\n".join(f"  - {problem}" for problem in problems)
        )
    for g, own in factors.items():
        measure(groups[g], own)
    tensors = [t for f in all_factors(factors) for t in (f.A, f.B, f.magnitude, f.gains)]
    size = sum({id(t): t.nbytes for t in tensors if t is not None}.values())
    sites = dict.fromkeys(places[path].site.path for path in adapter.weights)
    rescaled = dict.fromkeys(places[path].site.path for path in adapter.magnitudes)
    names = adapter.name, adapter.rank, adapter.source
    return StoredAdapter(*names, tuple(sites), factors, size, tuple(rescaled), adapter.spans)


def _factors(place: BankPlace, weights: LoraWeights, groups: Sequence[Group]) -> Factors:
    group = groups[place.group]
    a = weights.A.t() if group.bank.kind == "embedding" else weights.A
    pin = group.bank.A.is_cuda
    magnitude = weights.magnitude
    if magnitude is not None:
        magnitude = host_copy(magnitude, torch.float32, pin=False)
    return Factors(
        place.sibling,
        place.offset,
        host_copy(a, group.bank.A.dtype, pin),
        host_copy(weights.B.mT, group.bank.B.dtype, pin),
        weights.scale,
        weights.ranks,
        magnitude,
        None if magnitude is None else torch.zeros_like(magnitude),
    )
