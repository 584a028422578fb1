"""From an adapter as its file has it to what the banks take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from lorafx.adapter_store.dora import measure
from lorafx.adapter_store.host_copies import HostCopy
from lorafx.adapter_store.origins import Origin
from lorafx.adapter_store.stored import (
    BankPlace,
    StoredAdapter,
    all_factors,
    host_copy,
    misfit,
    sharing,
)
from lorafx.adapter_store.windows import width_of
from lorafx.errors import CapacityError, CheckpointError, Setting, nearest
from lorafx.model.bank import Bank, Factors, OwnWeight

if TYPE_CHECKING:
    from lorafx.adapter_store.peft_reader import Adapter
    from lorafx.adapter_store.reading import LoraWeights
    from lorafx.model.sites import Group, Site


def fitted(
    adapter: Adapter,
    places: Mapping[str, BankPlace],
    groups: Sequence[Group],
    max_rank: int,
    origin: Origin | None = None,
) -> StoredAdapter:
    """`adapter` in the dtype and layout of the banks of `groups`; `places` are theirs by path, and
    `origin` says where it can be read again.

    Raises:
        CapacityError: its rank is over `max_rank`, or the banks have no room for DoRA or
            biases.
        CheckpointError: sites, shapes, or values beyond the banks' dtype.
    """
    _check_room(adapter, places, groups, max_rank)
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
    own_rows: dict[int, OwnWeight] = {}
    for path, weight in adapter.own.items():
        place = places.get(path)
        if place is None:
            problems.append(f"{path} is not a site{nearest(path, places)}")
            continue
        rows = _own_weight(place.site, weight, groups[place.group].bank)
        own_rows[place.group] = rows
        bias = rows.bias if rows.bias is None else rows.bias[: len(weight.rows)]
        if not all(bool(torch.isfinite(t).all()) for t in (rows.rows, bias) if t is not None):
            problems.append(f"{path}: values beyond the range of {rows.rows.dtype}")
    if problems:
        raise CheckpointError(
            f"adapter {adapter.name!r} from {adapter.source} does not fit the banks:\n"
            + "\n".join(f"  - {problem}" for problem in problems)
        )
    for g, own in factors.items():
        measure(groups[g], own)
    held = [t for f in all_factors(factors) for t in (f.A, f.B, f.magnitude, f.gains)]
    held += [t for f in all_factors(factors) for t in (f.bias, f.own_bias, f.shift)]
    size = sum({id(t): t.nbytes for t in held if t is not None}.values())
    size += sum(weight.nbytes for weight in own_rows.values())
    owned = tuple(places[path].site.path for path in adapter.own)
    sites = dict.fromkeys([*(places[path].site.path for path in adapter.weights), *owned])
    rescaled = dict.fromkeys(places[path].site.path for path in adapter.magnitudes)
    shifted = tuple(dict.fromkeys(places[path].site.path for path in _biased(adapter)))
    return StoredAdapter(
        adapter.name,
        adapter.rank,
        adapter.source,
        tuple(sites),
        HostCopy(factors, size, own_rows),
        tuple(rescaled),
        adapter.spans,
        owned,
        adapter.notes,
        shifted,
        adapter.invocation,
        None if adapter.compared else origin,
        adapter.keys if origin is None or adapter.compared else {},
        width=width_of(groups, factors),
    )


def _check_room(
    adapter: Adapter, places: Mapping[str, BankPlace], groups: Sequence[Group], max_rank: int
) -> None:
    """Raise CapacityError where banks lack the rank of the adapter, or tables that it needs."""
    if adapter.rank > max_rank:
        setting = Setting.asked("max_rank", adapter.rank)
        raise CapacityError(
            f"adapter {adapter.name!r} has rank {adapter.rank}, over max_rank = "
            f"{max_rank}; {setting}",
            settings=(setting,),
        )
    if adapter.magnitudes and all(group.bank.gains is None for group in groups):
        setting = Setting.asked("use_dora", True, given=True)
        raise CapacityError(
            f"adapter {adapter.name!r} is a DoRA adapter, for which the banks have no "
            f"room; {setting}",
            settings=(setting,),
        )
    biased = _biased(adapter)
    if biased and not any(groups[places[p].group].bank.shifts is not None for p in biased):
        setting = Setting.asked("lora_bias", True, given=True)
        raise CapacityError(
            f"adapter {adapter.name!r} was trained with biases (lora_bias, bias), for which the "
            f"banks have no room; {setting}",
            settings=(setting,),
        )


def _biased(adapter: Adapter) -> list[str]:
    """The paths of the weights with biases."""
    return [p for p, w in adapter.weights.items() if w.bias is not None or w.own_bias is not None]


def _own_weight(site: Site, weight: OwnWeight, bank: Bank) -> OwnWeight:
    """Rows of an adapter's own in the bank's dtype, on the host. A linear that was trained as a
    whole with fewer outputs than the base has: those that it lacks are −inf."""
    assert bank.own is not None
    rows, bias = weight.rows, weight.bias
    lacks = site.weight_rows - len(rows)
    if weight.at is None and lacks and site.eligible.kind == "linear":
        bias = rows.new_zeros(len(rows)) if bias is None else bias
        rows = torch.nn.functional.pad(rows, (0, 0, 0, lacks))
        bias = torch.nn.functional.pad(bias, (0, lacks), value=-torch.inf)
    pin = bank.own.is_cuda
    return OwnWeight(
        host_copy(rows, bank.own.dtype, pin),
        None if bias is None else host_copy(bias, bank.own.dtype, pin),
        None if weight.at is None else host_copy(weight.at, torch.int32, pin),
    )


def _factors(place: BankPlace, weights: LoraWeights, groups: Sequence[Group]) -> Factors:
    group = groups[place.group]
    a = weights.A.t() if group.bank.kind == "embedding" else weights.A
    pin = group.bank.A.is_cuda
    magnitude = weights.magnitude
    if magnitude is not None:
        magnitude = host_copy(magnitude, torch.float32, pin=False)
    shape = (weights.B.shape[-2],)
    shifted = weights.bias is not None or weights.own_bias is not None
    return Factors(
        place.sibling,
        place.offset,
        host_copy(a, group.bank.A.dtype, pin),
        host_copy(weights.B.mT, group.bank.B.dtype, pin),
        weights.scale,
        weights.ranks,
        magnitude,
        None if magnitude is None else torch.zeros_like(magnitude),
        None if weights.bias is None else host_copy(weights.bias, torch.float32, pin=False),
        None if weights.own_bias is None else host_copy(weights.own_bias, torch.float32, pin=False),
        torch.zeros(shape) if shifted else None,
    )
