"""Saved factors of all experts of a parameter, by their shapes, as (E, r, K) and (E, N, r).

    ΔW[e] = s · B[e] A[e],   W (E, N, K)

    stacked by PEFT    A (r·E, K), row e·r + j;   B (N, r·E), column j·E + e
    exchanged          A (r·E, N), B (K, r·E):    ΔW[e] = s · (B[e] A[e])ᵀ
    apart              A (E, r, K), B (E, N, r)
    shared             A (r, K) or B (N, r), the same for all experts

PEFT reads a parameter's dimensions by the module's attribute `is_transposed`, before 0.19 by their
order alone: where that differs from what the module computes, its A and B are exchanged. The
shapes tell unless K = N; then its version does.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from lorafx.model.experts import ExpertWeight

#: The first release that reads `is_transposed`.
_READS_TRANSPOSED = (0, 19)


class Stacked(NamedTuple):
    """A (E, r, K) and B (E, N, r)."""

    A: Tensor
    B: Tensor

    @property
    def rank(self) -> int:
        return self.A.shape[1]


class ExpertSizes(NamedTuple):
    """E, K and N of the columns that are meant."""

    experts: int
    in_features: int
    out_features: int


def exchanged(
    module: nn.Module, weight: ExpertWeight, version: tuple[int, ...] | None
) -> bool | None:
    """Whether PEFT of this version exchanges A and B of `weight`; None for an unknown version."""
    if version is None:
        return None
    if version < _READS_TRANSPOSED:
        return not weight.transposed
    return bool(getattr(module, "is_transposed", False)) != weight.transposed


def wrapped(a: Tensor, b: Tensor, sizes: ExpertSizes, swapped: bool | None) -> Stacked | str:
    """Factors that PEFT's wrapper of a parameter saved; a str says why they do not fit.

    `swapped` decides where both orders fit: see `exchanged`.
    """
    experts, k, n = sizes
    if a.dim() == b.dim() == 3:
        return named(a, b, sizes, None)
    straight, crossed = _stacks(a, b, experts, k, n), _stacks(a, b, experts, n, k)
    if straight and crossed and swapped is None:
        return (
            f"{k} = {n}, so the shapes do not show which of the two factors takes the "
            "input; adapter_config.json lacks peft_version, which would"
        )
    if crossed and (swapped or not straight):
        return Stacked(_columns(b, experts).mT, _rows(a, experts).mT)
    if straight:
        return Stacked(_rows(a, experts), _columns(b, experts))
    return (
        f"shapes {tuple(a.shape)} and {tuple(b.shape)} are not (r·{experts}, {k}) and "
        f"({n}, r·{experts}) for the {experts} experts of this model{_other_count(a, b, k, n)}"
    )


def named(a: Tensor, b: Tensor, sizes: ExpertSizes, rank: int | None) -> Stacked | str:
    """Factors under a parameter's own name, stacked, apart or shared, each in its own way.

    `rank` is the configuration's: it decides where one factor for all and stacked ones look alike.
    """
    experts, k, n = sizes
    misfit = (
        f"shapes {tuple(a.shape)} and {tuple(b.shape)} do not fit {experts} experts with A "
        f"(r, {k}) and B ({n}, r) each, or one for all"
    )
    if not {a.dim(), b.dim()} <= {2, 3}:
        return misfit
    if a.dim() == b.dim() == 2 and k != n and _stacks(a, b, experts, n, k):
        return wrapped(a, b, sizes, True)
    if a.shape[-1] != k or b.shape[-2] != n or not (a.numel() and b.numel()):
        return misfit
    if any(t.dim() == 3 and t.shape[0] != experts for t in (a, b)):
        return misfit
    found = _rank(a, b, experts, rank)
    if found is None:
        return misfit
    if isinstance(found, str):
        return found
    return Stacked(_spread_a(a, experts, found), _spread_b(b, experts, found))


def _rank(a: Tensor, b: Tensor, experts: int, said: int | None) -> int | str | None:
    """r of factors that may be stacked, apart or shared; None where they do not go together."""
    rows, columns = a.shape[-2], b.shape[-1]
    if a.dim() == 3 or b.dim() == 3:
        if a.dim() == b.dim():
            return rows if rows == columns else None
        own, other = (rows, columns) if a.dim() == 3 else (columns, rows)
        return own if other in (own, own * experts) else None
    if rows == columns and experts > 1:
        # One pair for all experts, or one each: only the rank tells.
        if said == rows:
            return rows
        if said is not None and said * experts == rows:
            return said
        if said is None:
            return (
                f"{rows} rows may be one pair of rank {rows} for all experts, or one pair "
                "per expert; adapter_config.json lacks r, which would tell"
            )
        return f"rank {rows} for all experts or r·{experts} = {rows}, where the rank is {said}"
    if rows == columns * experts:
        return columns
    return rows if columns in (rows, rows * experts) else None


def _stacks(a: Tensor, b: Tensor, experts: int, k: int, n: int) -> bool:
    """Whether A (r·E, k) and B (n, r·E)."""
    if a.dim() != 2 or b.dim() != 2 or a.shape[0] != b.shape[1] or not a.shape[0]:
        return False
    return a.shape[1] == k and b.shape[0] == n and a.shape[0] % experts == 0


def _other_count(a: Tensor, b: Tensor, k: int, n: int) -> str:
    """What may be said of factors that fit but for the number of experts."""
    if _stacks(a, b, 1, k, n) or _stacks(a, b, 1, n, k):
        return f"; {a.shape[0]} is not a multiple of that, so it is for another number of experts"
    return ""


def _rows(a: Tensor, experts: int) -> Tensor:
    return a.reshape(experts, -1, a.shape[1])


def _columns(b: Tensor, experts: int) -> Tensor:
    return b.reshape(b.shape[0], -1, experts).permute(2, 0, 1)


def _spread_a(a: Tensor, experts: int, rank: int) -> Tensor:
    if a.dim() == 3:
        return a
    return a.expand(experts, -1, -1) if a.shape[0] == rank else _rows(a, experts)


def _spread_b(b: Tensor, experts: int, rank: int) -> Tensor:
    if b.dim() == 3:
        return b
    return b.expand(experts, -1, -1) if b.shape[1] == rank else _columns(b, experts)
