"""Arrow's prototypes, as an adapter: what a module compares tokens with to choose among adapters.

    A = [v_1; …; v_E]        B = [1; 0], so that the first E outputs of B A x are v_1ᵀ x, …, v_Eᵀ x

v_j (K,) is the first right singular vector of B_j A_j: where a module's A_j and B_j give most.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lorafx.adapter_store.fitting import slots_needed
from lorafx.adapter_store.names import MOST_GATES, Arrow, Mixture, Purified, members
from lorafx.adapter_store.stored import HostCopy, StoredAdapter, next_version
from lorafx.adapter_store.sums import refuse_in_gates, sum_of
from lorafx.errors import CapacityError, ConfigError, way_out_by
from lorafx.model.bank import Factors
from lorafx.model.sites import Group


def made_of(
    name: Mixture, adapters: Mapping[str, StoredAdapter], groups: Sequence[Group]
) -> StoredAdapter:
    """The adapter that a name stands for: a sum, or what an `Arrow` needs. Raises as these."""
    if isinstance(name, Arrow):
        return prototypes_of(name, adapters, groups)
    return (purified if isinstance(name, Purified) else sum_of)(name, adapters, groups)


def purified(
    name: str, adapters: Mapping[str, StoredAdapter], groups: Sequence[Group]
) -> StoredAdapter:
    """The first member of `name` without the mean A and B of the others. Raises ConfigError for
    others of other modules or ranks."""
    first, *general = (adapters[member] for member in members(name))
    refuse_in_gates((first, *general), name)
    factors: dict[int, list[Factors]] = {}
    for g, own in first.numbers.factors.items():
        others = [{f.sibling: f for f in item.numbers.factors.get(g, ())} for item in general]
        for f in own:
            beside = [items[f.sibling] for items in others if f.sibling in items]
            if len(beside) < len(general) or any(
                (o.A.shape, o.B.shape) != (f.A.shape, f.B.shape) for o in beside
            ):
                raise ConfigError(
                    f"{name!r}: at {groups[g].site_of(f.sibling).path} not all of these have LoRA "
                    "of one rank; give adapters of the same modules and rank"
                )
            a, b = _less(f.A, [o.A for o in beside]), _less(f.B, [o.B for o in beside])
            factors.setdefault(g, []).append(f._replace(A=a, B=b))
    copy = HostCopy(factors)
    return replace(first, name=name, host=copy, origin=None, memory=None, version=next_version())


def _less(own: Tensor, others: Sequence[Tensor]) -> Tensor:
    wide = torch.promote_types(own.dtype, torch.float32)
    return (own.to(wide) - torch.stack([o.to(wide) for o in others]).mean(0)).to(own.dtype)


def prototypes_of(
    name: Arrow, adapters: Mapping[str, StoredAdapter], groups: Sequence[Group]
) -> StoredAdapter:
    """The prototypes of the adapters of `name`.

    Raises ConfigError for adapters that are not plain LoRA of the same linears, CapacityError if
    there are more of them than `max_rank`.
    """
    refuse_in_gates((adapters[member] for member in members(name)), name)
    experts = [
        adapters[n] if n in adapters else purified(n, adapters, groups) for n in name.experts
    ]
    factors: dict[int, list[Factors]] = {}
    for g, group in enumerate(groups):
        given = [{f.sibling: f for f in expert.numbers.factors.get(g, ())} for expert in experts]
        for sibling in {sibling for items in given for sibling in items}:
            site = group.site_of(sibling)
            if lacking := [
                e.name for e, items in zip(experts, given, strict=True) if sibling not in items
            ]:
                raise ConfigError(
                    f"{name!r}: {lacking[0]!r} has nothing at {site.path}, which another of its "
                    "adapters changes; give adapters of the same modules"
                )
            factors.setdefault(g, []).append(
                _prototypes(name, [items[sibling] for items in given], group)
            )
    return StoredAdapter(
        name,
        len(experts),
        ", ".join(expert.source for expert in experts),
        experts[0].sites,
        HostCopy(factors),
        width=slots_needed(groups, factors),
    )


def _prototypes(name: Arrow, experts: Sequence[Factors], group: Group) -> Factors:
    first, site, count = experts[0], group.site_of(experts[0].sibling), len(experts)
    if group.bank.kind != "linear" or first.A.dim() != 2 or len(site.parts) > 1:
        raise ConfigError(
            f"{name!r}: {site.path} is no linear alone, and Arrow chooses adapters of such; give "
            "adapters without it, or leave it out by exclude_modules"
        )
    if count > group.bank.B.shape[1]:
        room = way_out_by("max_rank", count)
        raise CapacityError(
            f"{name!r} takes as much room as an adapter of rank {count}, and the bank of "
            f"{site.path} holds {group.bank.B.shape[1]}; {room}"
        ).naming(room)
    if first.B.shape[-1] < MOST_GATES:
        raise ConfigError(
            f"{name!r}: {site.path} has {first.B.shape[-1]} outputs, fewer than the {MOST_GATES} "
            "that Arrow needs; leave it out by exclude_modules"
        )
    vectors = torch.stack([_direction(f.A, f.B) for f in experts]).to(first.A.dtype)
    outputs = torch.eye(count, first.B.shape[-1], dtype=first.B.dtype)
    return Factors(first.sibling, first.offset, vectors, outputs, 1.0)


def _direction(a: Tensor, b: Tensor) -> Tensor:
    """The first right singular vector of bᵀ a, for a (r, K) and b (r, N); zeros if that is 0.

    With aᵀ = q t, it is q u for the last eigenvector u of t b bᵀ tᵀ (r, r).
    """
    a, b = a.double().cpu(), b.double().cpu()
    q, t = torch.linalg.qr(a.T)
    values, vectors = torch.linalg.eigh(t @ (b @ b.T) @ t.T)
    return q @ vectors[:, -1] * (values[-1] > 0)
