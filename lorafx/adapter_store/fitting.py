"""Fits decoded adapters to the banks: their places, dtype and layout."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lorafx.adapter_store.changed_weight import ChangedWeight
from lorafx.adapter_store.saved import Origin
from lorafx.adapter_store.stored import (
    Adapter,
    HostCopy,
    LoraWeights,
    StoredAdapter,
    host_copy,
    made_weight,
    measure,
)
from lorafx.adapter_store.untrusted_files import unsound
from lorafx.errors import CapacityError, CheckpointError, itemised, way_out_by
from lorafx.model.bank import Bank, Factors, OwnWeight
from lorafx.model.extras import EXTRAS
from lorafx.model.sites import Group, Site


class BankPlace(NamedTuple):
    """A part's group and site, its number in the bank, and its first column there."""

    group: int
    site: Site
    sibling: int
    offset: int


def places_of(groups: Sequence[Group]) -> dict[str, BankPlace]:
    """Part path -> its place in the banks."""
    return {
        site.part_path(part): BankPlace(g, site, *numbers)
        for g, group in enumerate(groups)
        for i, site in enumerate(group.sites)
        for part, numbers in enumerate(zip(*group.ranges(i)[:2], strict=True))
    }


def fit_to_banks(
    adapter: Adapter,
    places: Mapping[str, BankPlace],
    groups: Sequence[Group],
    origin: Origin | None = None,
) -> StoredAdapter:
    """`adapter`, read for the sites of `groups`, in the banks' dtype and layout. Raises
    CapacityError without room for DoRA or biases, CheckpointError for values beyond the dtype."""
    _check_room(adapter, places, groups)
    factors: dict[int, list[Factors]] = {}
    problems: list[str] = []
    for path, weights in adapter.weights.items():
        place = places[path]
        group_factors = factors.setdefault(place.group, [])
        new = _factors(place, weights, groups[place.group].bank)
        shared_a = next((f.A for f in group_factors if torch.equal(f.A, new.A)), new.A)
        group_factors.append(new._replace(A=shared_a))
        problems += _beyond_range(path, new.A.dtype, new.A, new.B)
    own_weights: dict[int, OwnWeight] = {}
    for path, weight in adapter.own_weights.items():
        place = places[path]
        rows = own_weights[place.group] = _own_weight(place.site, weight, groups[place.group].bank)
        bias = None if rows.bias is None else rows.bias[: len(weight.rows)]
        problems += _beyond_range(path, rows.rows.dtype, rows.rows, bias)
    changed: dict[int, ChangedWeight] = {}
    for path, function in adapter.changed.items():
        number = places[path].group
        changed[number] = function
        problems += change_beyond_range(groups[number], function)
    if problems:
        head = f"adapter {adapter.name!r} from {adapter.source} does not fit the banks"
        raise CheckpointError(itemised(head, problems))
    for g, group_factors in factors.items():
        measure(groups[g], group_factors)

    def sites(paths: Iterable[str]) -> tuple[str, ...]:
        return tuple(dict.fromkeys(places[path].site.path for path in paths))

    return StoredAdapter(
        adapter.name,
        adapter.rank,
        adapter.source,
        sites([*adapter.weights, *adapter.own_weights, *adapter.changed]),
        HostCopy(factors, own_weights, changed),
        extras={name: sites(paths) for name, paths in adapter.extras.items()},
        invocation=adapter.invocation,
        origin=origin,
        compared=adapter.compared,
        width=slots_needed(groups, factors),
    )


def change_beyond_range(group: Group, changed: ChangedWeight) -> list[str]:
    """A line if its numbers, or the weight that it makes, are beyond the range of the bank's."""
    own, made = group.bank.own, changed.structure is None
    assert own is not None
    numbers = made_weight(group, changed)[:2] if made else changed.tensors
    return _beyond_range(group.sites[0].path, own.dtype, *numbers)


def _beyond_range(path: str, dtype: torch.dtype, *tensors: Tensor | None) -> list[str]:
    """A line where numbers of these `tensors` are not finite in `dtype`."""
    beyond = any(unsound(tensor.to(dtype)) for tensor in tensors if tensor is not None)
    return [f"{path}: values beyond the range of {dtype}"] if beyond else []


def slots_needed(groups: Sequence[Group], factors: Mapping[int, Iterable[Factors]]) -> int:
    """How many consecutive slots an adapter takes, of its factors by group."""
    widths = (groups[g].bank.width(f.rank) for g, items in factors.items() for f in items)
    return max(widths, default=1)


def _check_room(adapter: Adapter, places: Mapping[str, BankPlace], groups: Sequence[Group]) -> None:
    for name, paths in adapter.extras.items():
        extra = EXTRAS[name]
        banks = [groups[places[path].group].bank for path in paths]
        if banks and all(getattr(bank, extra.room) is None for bank in banks):
            needed = way_out_by(extra.setting.partition("=")[0], True, given=True)
            raise CapacityError(
                f"adapter {adapter.name!r} has {extra.what} ({extra.training}), for which the "
                f"banks have no room; {needed}"
            ).naming(needed)


def _own_weight(site: Site, weight: OwnWeight, bank: Bank) -> OwnWeight:
    """Replaced rows in the bank's dtype, on the host; a whole linear's missing outputs are −inf."""
    assert bank.own is not None
    rows, bias = weight.rows, weight.bias
    missing = site.weight_rows - len(rows)
    if weight.indices is None and missing and site.eligible.kind == "linear":
        bias = rows.new_zeros(len(rows)) if bias is None else bias
        rows = torch.nn.functional.pad(rows, (0, 0, 0, missing))
        bias = torch.nn.functional.pad(bias, (0, missing), value=-torch.inf)
    pin = bank.own.is_cuda
    return OwnWeight(
        host_copy(rows, bank.own.dtype, pin),
        None if bias is None else host_copy(bias, bank.own.dtype, pin),
        None if weight.indices is None else host_copy(weight.indices, torch.int32, pin),
    )


def _factors(place: BankPlace, weights: LoraWeights, bank: Bank) -> Factors:
    a = weights.A.t() if bank.kind == "embedding" else weights.A
    pin = bank.A.is_cuda
    magnitude, bias, own_bias = (
        None if vector is None else host_copy(vector, torch.float32, pin=False)
        for vector in (weights.magnitude, weights.bias, weights.own_bias)
    )
    shifted = bias is not None or own_bias is not None
    return Factors(
        place.sibling,
        place.offset,
        host_copy(a, bank.A.dtype, pin),
        host_copy(weights.B.mT, bank.B.dtype, pin),
        weights.scale,
        weights.ranks,
        magnitude,
        None if magnitude is None else torch.zeros_like(magnitude),
        bias,
        own_bias,
        torch.zeros(weights.B.shape[-2]) if shifted else None,
    )
