"""A sum of adapters as one adapter, of the sum of their ranks.

    Σ_i w_i · s_i · B_i A_i = s · [B_1, v_2 · B_2, …] [A_1; A_2; …]      v_i = w_i · s_i / s

s is that w_i · s_i which is largest in magnitude, so nothing overflows, and the B of that adapter
keeps its bits. An adapter that is alone at a site keeps its own factors there, and only its scale
is another. A new weight is other numbers in the same banks, so no graph depends on it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lorafx.adapter_store.fitting import host_copy
from lorafx.adapter_store.names import Mixture
from lorafx.adapter_store.stored import HostCopy, StoredAdapter, next_version
from lorafx.adapter_store.windows import width_of
from lorafx.errors import CapacityError, ConfigError
from lorafx.model.bank import Bank, Factors
from lorafx.model.sites import Group

#: The factors of one adapter at one sibling of a bank, and the adapter's weight.
_Term = tuple[Factors, float]


def mixed(
    name: Mixture,
    adapters: Mapping[str, StoredAdapter],
    copies: Mapping[str, HostCopy],
    groups: Sequence[Group],
) -> StoredAdapter:
    """The sum that `name` stands for, of `adapters` that fit the banks of `groups`, with these
    host `copies`.

    Raises:
        ConfigError: what one of them does is not linear in its weight: DoRA, weights or biases of
            its own; one is an aLoRA adapter; or a scale is beyond float32.
        CapacityError: the sum of the ranks is over what a bank holds.
    """
    summed = [(adapters[own], weight) for own, weight in name.weights if weight]
    if len(summed) == 1 and summed[0][1] == 1:  # the others have weight 0
        one = summed[0][0]
        numbers = copies[one.name]
        host = HostCopy(numbers.factors, 0, numbers.own, {id(numbers): numbers.nbytes})
        return replace(one, name=name, host=host, origin=None, version=next_version())
    for adapter, _ in summed:
        _refuse(name, adapter)
    weighted = [(copies[adapter.name], weight) for adapter, weight in summed]
    terms = [_terms(g, weighted) for g in range(len(groups))]
    _check_room(name, terms, groups)
    factors = {
        g: _sums(name, of_group, group.bank)
        for g, (of_group, group) in enumerate(zip(terms, groups, strict=True))
        if of_group
    }
    made = {id(t): t.nbytes for sums in factors.values() for f in sums for t in (f.A, f.B)}
    used = {id(copy): {id(t) for t in _tensors(copy)} for copy, _ in weighted}
    new = made.keys() - set().union(*used.values())
    shared = {copy: sum(made.get(key, 0) for key in tensors) for copy, tensors in used.items()}
    return StoredAdapter(
        name,
        max((f.rank for sums in factors.values() for f in sums), default=0),
        ", ".join(adapter.source for adapter, _ in summed),
        tuple(dict.fromkeys(site for adapter, _ in summed for site in adapter.sites)),
        HostCopy(factors, sum(made[key] for key in new), shared=shared),
        width=width_of(groups, factors),
    )


def _tensors(copy: HostCopy) -> Iterator[Tensor]:
    for of_group in copy.factors.values():
        for factors in of_group:
            yield from (factors.A, factors.B)


def _terms(g: int, summed: Sequence[tuple[HostCopy, float]]) -> dict[int, list[_Term]]:
    found: dict[int, list[_Term]] = {}
    for numbers, weight in summed:
        for factors in numbers.factors.get(g, ()):
            found.setdefault(factors.sibling, []).append((factors, weight))
    return found


def _refuse(name: Mixture, adapter: StoredAdapter) -> None:
    """Raise ConfigError where what an adapter does is not linear in its weight."""
    shifted, owned = ", ".join(adapter.shifted), ", ".join(adapter.owned)
    reasons = {
        "is an aLoRA adapter, which serves only the tokens from its invocation on": (
            adapter.invocation
        ),
        "is a DoRA adapter, whose magnitudes are not linear in a weight": adapter.rescaled,
        f"was trained with biases (lora_bias or bias; {shifted})": shifted,
        f"has weights of its own ({owned}; modules_to_save or trainable tokens), which take the "
        "place of the base's": owned,
    }
    for reason, applies in reasons.items():
        if applies:
            raise ConfigError(
                f"{name!r}: {adapter.name!r} {reason}, so it can be part of no sum and has no "
                f"other scale; name it alone, {adapter.name!r}"
            )


def _check_room(
    name: Mixture, terms: Sequence[Mapping[int, list[_Term]]], groups: Sequence[Group]
) -> None:
    needed, said = 0, ""
    for own, group in zip(terms, groups, strict=True):
        room = group.bank.B.shape[1]
        for sibling, each in own.items():
            ranks = [factors.rank for factors, _ in each]
            site = group.site_of(sibling)
            rank = -(-sum(ranks) // site.terms)
            if sum(ranks) > room and rank > needed:
                needed = rank
                added = " + ".join(map(str, ranks))
                said = f"{added} = {sum(ranks)} at {site.path}, where the bank holds {room}"
    if needed:
        raise CapacityError(
            f"{name!r} has the sum of the ranks of its adapters, {said}; compile with "
            f"LoraConfig(max_rank={needed})"
        )


def _sums(name: Mixture, terms: Mapping[int, list[_Term]], bank: Bank) -> list[Factors]:
    """One pair of factors a sibling. Siblings whose adapters share their A share the sum's."""
    joined: dict[tuple[int, ...], Tensor] = {}
    found = []
    for each in terms.values():
        scale, shares = _scale(name, each)
        first = each[0][0]
        if len(each) == 1:
            found.append(first._replace(scale=scale))
            continue
        key = tuple(id(factors.A) for factors, _ in each)
        if key not in joined:
            every = [factors.A for factors, _ in each]
            joined[key] = _cat(every, -1 if bank.kind == "embedding" else -2, bank)
        scaled = [_scaled(f.B, share) for (f, _), share in zip(each, shares, strict=True)]
        ranks = _ranks([factors for factors, _ in each])
        found.append(
            first._replace(A=joined[key], B=_cat(scaled, -2, bank), scale=scale, ranks=ranks)
        )
    return found


def _scale(name: Mixture, each: Sequence[_Term]) -> tuple[float | Tensor, Tensor]:
    """s, and the v of each adapter, (adapters,); with experts (E,) and (adapters, E)."""
    experts = each[0][0].B.shape[:-2]
    own = [torch.as_tensor(f.scale, dtype=torch.float64).expand(experts) * w for f, w in each]
    scales = torch.stack(own)
    scale = scales.gather(0, scales.abs().argmax(0, keepdim=True)).squeeze(0)
    if not bool(torch.isfinite(scale.float()).all()):
        raise ConfigError(
            f"{name!r}: a scale of the sum is beyond the range of float32; give smaller scales"
        )
    shares = torch.where(scale != 0, scales / scale, 0.0)
    return scale.float() if experts else float(scale), shares


def _scaled(b: Tensor, share: Tensor) -> Tensor:
    wide = torch.promote_types(b.dtype, torch.float32)
    return (b.to(wide) * share.to(wide)[..., None, None]).to(b.dtype)


def _cat(tensors: Sequence[Tensor], dim: int, bank: Bank) -> Tensor:
    whole = torch.cat(list(tensors), dim)
    return host_copy(whole, whole.dtype, pin=True) if bank.A.is_cuda else whole


def _ranks(factors: Sequence[Factors]) -> Tensor | None:
    """The rank of each expert. Where an adapter has less than its widest expert, zeros follow."""
    if all(own.ranks is None for own in factors):
        return None
    start, ranks = 0, torch.zeros(factors[0].B.shape[0], dtype=torch.int32)
    for own in factors:
        these = torch.full_like(ranks, own.rank) if own.ranks is None else own.ranks
        ranks = torch.where(these > 0, start + these, ranks)
        start += own.rank
    return ranks
