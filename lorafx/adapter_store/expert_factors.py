"""Factors of routed experts: from their saved shapes to a pair for each part.

    ΔW[e] = Σ_t s_t · B_t[e] A_t[e],   W (E, N, K),   A (E, r, K),   B (E, N, r)

    stacked by PEFT    A (r·E, K), row e·r + j;   B (N, r·E), column j·E + e
    exchanged          A (r·E, N), B (K, r·E):    ΔW[e] = s · (B[e] A[e])ᵀ
    apart              A (E, r, K), B (E, N, r)
    shared             A (r, K) or B (N, r), the same for all experts

PEFT exchanges A and B where the module's `is_transposed`, or before 0.19 the order of dimensions,
disagrees with its computation. The shapes tell unless K = N; then PEFT's version does. Terms are of
the whole parameter, its gate, or its up projection; interleaved gate and up terms become a pair of
rank r_gate + r_up, with zeros in B at the other's columns.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lorafx.adapter_store.adapter import LoraWeights
from lorafx.adapter_store.findings import Problem
from lorafx.adapter_store.places import saved_sizes
from lorafx.model.experts import ExpertWeight, Half
from lorafx.model.sites import Site

#: The first release that reads `is_transposed`.
_READS_TRANSPOSED = (0, 19)


class Stacked(NamedTuple):
    """A (E, r, K) and B (E, N, r)."""

    A: Tensor
    B: Tensor

    @property
    def rank(self) -> int:
        return self.A.shape[1]


def sizes_of(weight: ExpertWeight, half: Half) -> tuple[int, int, int]:
    """E, K, and the N of a half of a parameter's columns."""
    divided = half != "all" and bool(weight.halves)
    n = weight.out_features // 2 if divided else weight.out_features
    return weight.experts, weight.in_features, n


def exchanged(
    module: nn.Module, weight: ExpertWeight, version: tuple[int, ...] | None
) -> bool | None:
    """Whether PEFT of this version exchanges A and B of `weight`; None for an unknown version."""
    if version is None:
        return None
    if version < _READS_TRANSPOSED:
        return not weight.transposed
    return bool(getattr(module, "is_transposed", False)) != weight.transposed


def wrapped(a: Tensor, b: Tensor, sizes: tuple[int, int, int], swapped: bool | None) -> Stacked:
    """Factors from PEFT's wrapper; `swapped` decides where both orders fit. Raises `Problem`."""
    experts, k, n = sizes
    if a.dim() == b.dim() == 3:
        return named(a, b, sizes, None)
    straight, crossed = _stacks(a, b, experts, k, n), _stacks(a, b, experts, n, k)
    if straight and crossed and swapped is None:
        raise Problem(
            f"{k} = {n}, so the shapes do not show which of the two factors takes the "
            "input; adapter_config.json lacks peft_version, which would"
        )
    if crossed and (swapped or not straight):
        return Stacked(_stacked_columns(b, experts).mT, _rows(a, experts).mT)
    if straight:
        return Stacked(_rows(a, experts), _stacked_columns(b, experts))
    other = ""
    if _stacks(a, b, 1, k, n) or _stacks(a, b, 1, n, k):
        other = f"; {a.shape[0]} is not a multiple of that, so it is for another number of experts"
    raise Problem(
        f"shapes {tuple(a.shape)} and {tuple(b.shape)} are not (r·{experts}, {k}) and "
        f"({n}, r·{experts}) for the {experts} experts of this model{other}"
    )


def named(a: Tensor, b: Tensor, sizes: tuple[int, int, int], rank: int | None) -> Stacked:
    """Factors under a parameter's name: each stacked, apart or shared. The configured `rank`
    decides where shared and stacked shapes coincide. Raises `Problem` where nothing fits."""
    experts, k, n = sizes
    matrices = a.dim() == b.dim() == 2
    if matrices and k != n and _stacks(a, b, experts, n, k):
        return wrapped(a, b, sizes, True)
    fits = {a.dim(), b.dim()} <= {2, 3} and a.shape[-1] == k and b.shape[-2] == n
    fits = fits and a.numel() > 0 and b.numel() > 0
    fits = fits and all(t.dim() == 2 or t.shape[0] == experts for t in (a, b))
    found = _rank(a, b, experts, rank) if fits else None
    if found is None:
        raise Problem(
            f"shapes {tuple(a.shape)} and {tuple(b.shape)} do not fit {experts} experts with A "
            f"(r, {k}) and B ({n}, r) each, or one for all"
        )
    if a.dim() == 2:
        a = a.expand(experts, -1, -1) if a.shape[0] == found else _rows(a, experts)
    if b.dim() == 2:
        b = b.expand(experts, -1, -1) if b.shape[1] == found else _stacked_columns(b, experts)
    return Stacked(a, b)


def _rank(a: Tensor, b: Tensor, experts: int, configured: int | None) -> int | None:
    """r of factors in any layout, None if shapes disagree; raises `Problem` if ambiguous."""
    rows, columns = a.shape[-2], b.shape[-1]
    if a.dim() == 3 or b.dim() == 3:
        if a.dim() == b.dim():
            return rows if rows == columns else None
        apart, other = (rows, columns) if a.dim() == 3 else (columns, rows)
        return apart if other in (apart, apart * experts) else None
    if rows == columns and experts > 1:
        # Shared or stacked: only the rank tells.
        if configured == rows:
            return rows
        if configured is not None and configured * experts == rows:
            return configured
        if configured is None:
            raise Problem(
                f"{rows} rows may be one pair of rank {rows} for all experts, or one pair "
                "per expert; adapter_config.json lacks r, which would tell"
            )
        raise Problem(
            f"rank {rows} for all experts or r·{experts} = {rows}, where the rank is {configured}"
        )
    if rows == columns * experts:
        return columns
    return rows if columns in (rows, rows * experts) else None


def _stacks(a: Tensor, b: Tensor, experts: int, k: int, n: int) -> bool:
    if a.dim() != 2 or b.dim() != 2 or a.shape[0] != b.shape[1] or not a.shape[0]:
        return False
    return a.shape[1] == k and b.shape[0] == n and a.shape[0] % experts == 0


def _rows(a: Tensor, experts: int) -> Tensor:
    return a.reshape(experts, -1, a.shape[1])


def _stacked_columns(b: Tensor, experts: int) -> Tensor:
    return b.reshape(b.shape[0], -1, experts).permute(2, 0, 1)


class ExpertTerm(NamedTuple):
    """Factors of n experts, A (n, r, K) and B (n, N, r), N the columns of a half, and s."""

    half: Half
    experts: range
    A: Tensor
    B: Tensor
    scale: float
    label: str


def _check_overlap(terms: Sequence[ExpertTerm], name: str) -> None:
    seen: dict[tuple[int, Half], ExpertTerm] = {}
    for term in terms:
        halves: tuple[Half, ...] = ("gate", "up") if term.half == "all" else (term.half,)
        for key in ((expert, half) for expert in term.experts for half in halves):
            other = seen.setdefault(key, term)
            if other is not term:
                raise Problem(
                    f"{other.label} and {term.label} both have factors for the same columns of "
                    f"{name}; keep one"
                )


def assembled(site: Site, terms: Sequence[ExpertTerm]) -> Iterator[tuple[str, LoraWeights]]:
    """(part path, factors) in the terms' widest dtype. Raises `Problem` where terms overlap."""
    assert site.expert_weight is not None
    _check_overlap(terms, site.expert_weight.name)
    for index in range(len(site.parts)):
        touching = [
            (term, b)
            for term in terms
            if (b := _columns(site, index, term.half, term.B)) is not None
        ]
        if not touching:
            continue
        whole, sharding = _joined(site.experts, touching), site.eligible.sharding
        if sharding is not None:  # this rank's share
            a, b = sharding.cut(site.module, site.parts[index].slices, whole.A, whole.B)
            whole = whole._replace(A=a, B=b)
        yield site.part_path(index), whole


def _columns(site: Site, part: int, half: Half, b: Tensor) -> Tensor | None:
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
    ranks = torch.zeros(experts, dtype=torch.int32)
    for term, _ in terms:
        ranks[term.experts.start : term.experts.stop] += term.A.shape[1]
    first, b = terms[0]
    dtype = torch.float16 if first.A.dtype is torch.float16 else torch.bfloat16
    for term, columns in terms:
        dtype = torch.promote_types(torch.promote_types(dtype, term.A.dtype), columns.dtype)
    most = int(ranks.max())
    joined_a = torch.zeros(experts, most, first.A.shape[2], dtype=dtype)
    joined_b = torch.zeros(experts, b.shape[1], most, dtype=dtype)
    scales = torch.zeros(experts)
    used = [0] * experts
    for term, columns in terms:
        for at, expert in enumerate(term.experts):
            start, end = used[expert], used[expert] + term.A.shape[1]
            joined_a[expert, start:end] = term.A[at]
            joined_b[expert, :, start:end] = columns[at]
            used[expert] = end
            if start and float(scales[expert]) != term.scale:
                # An expert has a single scale, so B absorbs unequal scales of terms.
                joined_b[expert, :, :start] *= scales[expert].to(dtype)
                joined_b[expert, :, start:end] *= term.scale
                scales[expert] = 1
            else:
                scales[expert] = term.scale
    return LoraWeights(joined_a, joined_b, scales, ranks)
