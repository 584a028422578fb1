"""Sums of adapters, as adapters: Σ wᵢ ΔWᵢ with the factors of all beside one another."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lorafx.adapter_store.changed_weight import ChangedWeight
from lorafx.adapter_store.fitting import change_beyond_range, slots_needed
from lorafx.adapter_store.names import Mixture
from lorafx.adapter_store.stored import HostCopy, StoredAdapter, host_copy, next_version
from lorafx.errors import CapacityError, ConfigError, way_out_by
from lorafx.model.bank import Bank, Factors
from lorafx.model.sites import Group

#: For each sibling of a bank, the factors to add, each with its adapter's weight.
_Terms = dict[int, list[tuple[Factors, float]]]


def sum_of(
    name: Mixture, adapters: Mapping[str, StoredAdapter], groups: Sequence[Group]
) -> StoredAdapter:
    """The sum `name` of `adapters`, as an adapter whose rank is the sum of theirs.

        Σ_i w_i · s_i · B_i A_i = s · [B_1, v_2 · B_2, …] [A_1; A_2; …]      v_i = w_i · s_i / s

    s is the w_i · s_i of largest magnitude, so nothing overflows and that adapter's B keeps its
    bits. Where a single adapter has factors, only their scale changes. No graph depends on weights.

    What is added without factors (a Kronecker product, a whole difference) is multiplied by w_i;
    several of them at a site are a weight of the sum's own.

    Raises ConfigError for an adapter that is not linear in its weight and for a scale beyond
    float32, CapacityError for a sum of ranks beyond a bank's, or without room for that weight.
    """
    summands = [(adapters[member], weight) for member, weight in name.weights if weight]
    if len(summands) == 1 and summands[0][1] == 1:  # all others have weight 0
        single = summands[0][0]
        return replace(single, name=name, host=single.numbers, version=next_version())
    for adapter, _ in summands:
        _refuse_nonlinear(repr(name), adapter)
    terms: list[_Terms] = [{} for _ in groups]
    for adapter, weight in summands:
        for g, group_factors in adapter.numbers.factors.items():
            for f in group_factors:
                terms[g].setdefault(f.sibling, []).append((f, weight))
    _check_room(name, terms, groups)
    changed = _changes(name, summands, groups)
    factors = {g: _sum_factors(name, ts, groups[g].bank) for g, ts in enumerate(terms) if ts}
    return StoredAdapter(
        name,
        max((f.rank for sums in factors.values() for f in sums), default=0),
        ", ".join(adapter.source for adapter, _ in summands),
        tuple(dict.fromkeys(site for adapter, _ in summands for site in adapter.sites)),
        HostCopy(factors, changed=changed),
        extras={"own": tuple(groups[g].sites[0].path for g in changed)},
        width=slots_needed(groups, factors),
    )


def _changes(
    name: Mixture, summands: Sequence[tuple[StoredAdapter, float]], groups: Sequence[Group]
) -> dict[int, ChangedWeight]:
    changes: dict[int, ChangedWeight] = {}
    for adapter, weight in summands:
        for g, changed in adapter.numbers.changed.items():
            scaled = changed.times(weight)
            changes[g] = changes[g].plus(scaled) if g in changes else scaled
            own, site = groups[g].bank.own, groups[g].sites[0]
            assert own is not None
            if changes[g].structure is None and own.shape[1] < site.weight_rows:
                needed = way_out_by("modules_to_save", [site.path])
                raise CapacityError(
                    f"{name!r}: several of its adapters change {site.path} by more than low-rank "
                    f"factors, which takes room for a whole weight of the sum's own; {needed}"
                ).naming(needed)
    for g, changed in changes.items():
        if problems := change_beyond_range(groups[g], changed):
            raise ConfigError(f"{name!r}: {problems[0]}; give smaller scales")
    return changes


def refuse_in_gates(adapters: Iterable[StoredAdapter], what: object = "adapter_gates") -> None:
    """Raise ConfigError for an adapter that is not linear in a weight, or has more than factors."""
    for adapter in adapters:
        _refuse_nonlinear(f"{what}", adapter)
        if adapter.numbers.changed:
            raise ConfigError(
                f"{what}: {adapter.name!r} changes weights by more than low-rank factors, "
                "which gates per token do not add; give it by adapter_slots, or one mix for a row "
                "by gates of shape (B, k)"
            )


def _refuse_nonlinear(what: str, adapter: StoredAdapter) -> None:
    dora, biases = (adapter.extras.get(name) for name in ("dora", "bias"))
    reasons = {
        "is an aLoRA adapter, which serves only the tokens from its invocation on": (
            adapter.invocation
        ),
        "is a DoRA adapter, whose magnitudes are not linear in a weight": dora,
        "was trained with biases (lora_bias or bias)": biases,
        "has weights of its own (modules_to_save, trainable tokens or another method), which take "
        "the place of the base's": not adapter.numbers.adds,
    }
    for reason, applies in reasons.items():
        if applies:
            raise ConfigError(
                f"{what}: {adapter.name!r} {reason}, so it can be part of no sum and has no "
                f"other scale; name it alone, {adapter.name!r}"
            )


def _check_room(name: Mixture, terms: Sequence[_Terms], groups: Sequence[Group]) -> None:
    needed, where = 0, ""
    for siblings, group in zip(terms, groups, strict=True):
        max_rank = group.bank.B.shape[1]
        for sibling, summed in siblings.items():
            ranks = [factors.rank for factors, _ in summed]
            site = group.site_of(sibling)
            rank = -(-sum(ranks) // site.terms)
            if sum(ranks) > max_rank and rank > needed:
                needed, added = rank, " + ".join(map(str, ranks))
                where = f"{added} = {sum(ranks)} at {site.path}, where the bank holds {max_rank}"
    if needed:
        room = way_out_by("max_rank", needed)
        raise CapacityError(
            f"{name!r} has the sum of the ranks of its adapters, {where}; {room}"
        ).naming(room)


def _sum_factors(name: Mixture, terms: _Terms, bank: Bank) -> list[Factors]:
    """The sum's factors for each sibling. Siblings whose adapters share A share the sum's A."""
    joined: dict[tuple[int, ...], Tensor] = {}
    sums = []
    for summed in terms.values():
        factors = [f for f, _ in summed]
        # s, and the v of the adapters, (adapters,); with experts (E,) and (adapters, E).
        experts = factors[0].B.shape[:-2]
        scales = torch.stack(
            [torch.as_tensor(f.scale, dtype=torch.float64).expand(experts) * w for f, w in summed]
        )
        scale = scales.gather(0, scales.abs().argmax(0, keepdim=True)).squeeze(0)
        if not bool(torch.isfinite(scale.float()).all()):
            raise ConfigError(
                f"{name!r}: a scale of the sum is beyond the range of float32; give smaller scales"
            )
        s = scale.float() if experts else float(scale)
        if len(factors) == 1:
            sums.append(factors[0]._replace(scale=s))
            continue
        key = tuple(id(f.A) for f in factors)
        if key not in joined:
            dim = -1 if bank.kind == "embedding" else -2
            joined[key] = _concat([f.A for f in factors], dim, bank)
        shares = torch.where(scale != 0, scales / scale, 0.0)
        scaled = [_scaled(f.B, share) for f, share in zip(factors, shares, strict=True)]
        a, b = joined[key], _concat(scaled, -2, bank)
        sums.append(factors[0]._replace(A=a, B=b, scale=s, ranks=_summed_ranks(factors)))
    return sums


def _scaled(b: Tensor, share: Tensor) -> Tensor:
    wide = torch.promote_types(b.dtype, torch.float32)
    return (b.to(wide) * share.to(wide)[..., None, None]).to(b.dtype)


def _concat(tensors: Sequence[Tensor], dim: int, bank: Bank) -> Tensor:
    tensor = torch.cat(list(tensors), dim)
    return host_copy(tensor, tensor.dtype, pin=True) if bank.A.is_cuda else tensor


def _summed_ranks(factors: Sequence[Factors]) -> Tensor | None:
    if all(f.ranks is None for f in factors):
        return None
    start, ranks = 0, torch.zeros(factors[0].B.shape[0], dtype=torch.int32)
    for f in factors:
        term_ranks = torch.full_like(ranks, f.rank) if f.ranks is None else f.ranks
        ranks = torch.where(term_ranks > 0, start + term_ranks, ranks)
        start += f.rank
    return ranks
