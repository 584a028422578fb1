"""Low-rank terms of routed experts, put together as one pair of factors per part.

    ΔW[e] = Σ_t s_t · B_t[e] A_t[e]

The terms t are what an adapter has for expert e: factors of the whole parameter, or of its gate and
of its up projection. Where gate and up are parts of their own each part has one term. Where their
columns are interleaved both terms become one pair of rank r_gate + r_up, with zeros in B at the
other's columns: nothing is approximated.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lorafx.adapter_store.lora_weights import LoraWeights
from lorafx.adapter_store.places import saved_sizes
from lorafx.model.experts import ExpertWeight, Half
from lorafx.model.sites import Site


class ExpertTerm(NamedTuple):
    """One pair of factors for each of some experts.

    Attributes:
        half: which columns B has.
        experts: the n experts.
        A, B: (n, r, K) and (n, N, r), N the columns of that half.
        scale: s.
        label: what messages call it.
    """

    half: Half
    experts: range
    A: Tensor
    B: Tensor
    scale: float
    label: str


def columns_of(weight: ExpertWeight, half: Half) -> int:
    """N of a half of a parameter's columns."""
    divided = half != "all" and bool(weight.halves)
    return weight.out_features // 2 if divided else weight.out_features


def overlap(terms: Sequence[ExpertTerm]) -> tuple[ExpertTerm, ExpertTerm] | None:
    """Two terms for the same columns of one expert, or None."""
    seen: dict[tuple[int, Half], ExpertTerm] = {}
    for term in terms:
        halves: tuple[Half, ...] = ("gate", "up") if term.half == "all" else (term.half,)
        for expert in term.experts:
            for half in halves:
                other = seen.setdefault((expert, half), term)
                if other is not term:
                    return other, term
    return None


def assembled(site: Site, terms: Sequence[ExpertTerm]) -> Iterator[tuple[str, LoraWeights]]:
    """(part path, factors) of each part of `site` that a term touches.

    `terms` are without overlap. A and B have the widest dtype of them.
    """
    for index in range(len(site.parts)):
        own = [
            (term, b)
            for term in terms
            if (b := _columns(site, index, term.half, term.B)) is not None
        ]
        if own:
            yield site.part_path(index), _own_share(site, index, _joined(site.experts, own))


def _own_share(site: Site, part: int, whole: LoraWeights) -> LoraWeights:
    """What of a part's factors is this rank's."""
    sharding = site.eligible.sharding
    if sharding is None:
        return whole
    a, b = sharding.cut(site.module, site.parts[part].slices, whole.A, whole.B)
    return whole._replace(A=a, B=b)


def _columns(site: Site, part: int, half: Half, b: Tensor) -> Tensor | None:
    """The rows of B that are columns of this part, (n, N, r); None where there are none."""
    weight, size = site.expert_weight, saved_sizes((site, part))[1]
    assert weight is not None
    if weight.halves == "stacked":
        if half == "all":
            return b[:, part * size : (part + 1) * size]
        return b if ("gate", "up")[part] == half else None
    if weight.halves == "interleaved" and half != "all":
        wide = b.new_zeros(b.shape[0], size, b.shape[2])
        wide[:, 0 if half == "gate" else 1 :: 2] = b
        return wide
    return b


def _joined(experts: int, terms: Sequence[tuple[ExpertTerm, Tensor]]) -> LoraWeights:
    """The terms of one part beside each other in r."""
    ranks = torch.zeros(experts, dtype=torch.int32)
    for term, _ in terms:
        ranks[_slice(term)] += term.A.shape[1]
    first, b = terms[0]
    dtype = torch.float16 if first.A.dtype is torch.float16 else torch.bfloat16
    for term, own in terms:
        dtype = torch.promote_types(torch.promote_types(dtype, term.A.dtype), own.dtype)
    most = int(ranks.max())
    joined_a = torch.zeros(experts, most, first.A.shape[2], dtype=dtype)
    joined_b = torch.zeros(experts, b.shape[1], most, dtype=dtype)
    scales = torch.zeros(experts)
    used = [0] * experts
    for term, own in terms:
        for at, expert in enumerate(term.experts):
            start, end = used[expert], used[expert] + term.A.shape[1]
            joined_a[expert, start:end] = term.A[at]
            joined_b[expert, :, start:end] = own[at]
            used[expert] = end
            if start and float(scales[expert]) != term.scale:
                # Terms of unequal scales: there is one scale an expert, so B takes them.
                joined_b[expert, :, :start] *= scales[expert].to(dtype)
                joined_b[expert, :, start:end] *= term.scale
                scales[expert] = 1
            else:
                scales[expert] = term.scale
    return LoraWeights(joined_a, joined_b, scales, ranks)


def _slice(term: ExpertTerm) -> slice:
    return slice(term.experts.start, term.experts.stop)
