"""The change ΔW that an adapter makes to each base tensor, in its stored layout, added in place.

    linear (N, K)            ΔW[o : o + n]       = s · Bᵀ A        A (r, K), B (r, n)
    linear (K, N)            ΔW[:, o : o + n]    = s · Aᵀ B
    embedding (V, N)         ΔW                  = s · A B         A (V, r), B (r, N)
    convolution (N, C, k…)   ΔW as of a linear, its kernels as rows
    experts (E, N, K)        ΔW[e, o : o + n]    = s_e · B_eᵀ A_e  A (E, r, K), B (E, r, n)
    experts (E, K, N)        ΔW[e, :, o : o + n] = s_e · A_eᵀ B_e
    DoRA                     (1 + G) ⊙ (W + ΔW) − W, by output (lorafx.adapter_store.stored)
    replaced rows            W_own − W + ΔW, in those rows
    bias (N,)                s·b + b' − b, by output (`BiasDelta`)
    quantised weights        requantise(dequantise(W) + ΔW), if `requantize` is set

o is the first output column of a part of the site. Factors are this rank's share, in the banks'
dtype. ΔW is computed a few rows at a time, in float32 (float64 for a float64 weight).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from lorafx.adapter_store.stored import StoredAdapter
from lorafx.errors import MatchError
from lorafx.model.bank import Factors, OwnWeight
from lorafx.model.convolutions import weight_shape
from lorafx.model.module_graph import writing
from lorafx.model.sites import Group, Site

#: Bytes of ΔW that are computed at once: on a CPU, they fit into a cache.
BLOCK_ON_CPU, BLOCK = 1 << 22, 1 << 26


@dataclass(frozen=True)
class DeltaTerm:
    """The factors of one part of a site, and the part's first output column in the site."""

    factors: Factors
    start: int

    @property
    def columns(self) -> slice:
        return slice(self.start, self.start + self.factors.B.shape[-1])


@dataclass(frozen=True, eq=False)
class Delta:
    """ΔW of one site, and the rows of its weight that the adapter replaces."""

    site: Site
    terms: tuple[DeltaTerm, ...]
    own_weight: OwnWeight | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        site = self.site
        if site.eligible.kind == "conv":
            return weight_shape(site.module)
        pair = (site.out_features, site.in_features)
        if site.eligible.transposed or site.eligible.kind == "embedding":
            pair = pair[::-1]
        return pair if site.expert_weight is None else (site.experts, *pair)

    def update(self, start: int, stop: int, before: Tensor) -> Tensor:
        """What to add to rows [start, stop), which hold `before`, for all parts of the adapter."""
        update, kind = before.new_zeros(before.shape), self.site.eligible.kind
        if self.site.expert_weight is not None:
            for term, e in product(self.terms, range(start, stop)):
                delta, f = update[e - start], term.factors
                delta = delta.mT if self.site.eligible.transposed else delta
                rank = f.rank if f.ranks is None else int(f.ranks[e])
                scale = f.scale[e] if isinstance(f.scale, Tensor) else f.scale
                _add_product(delta[term.columns], f.B[e, :rank], f.A[e, :rank], scale)
            return update
        # Views (outputs, inputs): `update` is contiguous.
        across = self.site.eligible.transposed or kind == "embedding"
        delta, weight = (t.mT if across else t.flatten(1) for t in (update, before))
        first, inputs = (0, slice(start, stop)) if across else (start, slice(None))
        for term in self.terms:
            f, columns = term.factors, term.columns
            low, high = max(first, columns.start), min(first + len(delta), columns.stop)
            if low >= high:
                continue
            rows, own = slice(low - first, high - first), slice(low - term.start, high - term.start)
            a = f.A.mT if kind == "embedding" else f.A
            _add_product(delta[rows], f.B[:, own], a[:, inputs], f.scale)
            if f.gains is not None:
                gains = _cast_like(update, f.gains[own])[:, None]
                delta[rows] += gains * (weight[rows] + delta[rows])
        if self.own_weight is not None:
            self._add_replaced_rows(self.own_weight, update, start, stop, before)
        return update

    def _add_replaced_rows(
        self, weight: OwnWeight, update: Tensor, start: int, stop: int, before: Tensor
    ) -> None:
        rows = _cast_like(update, weight.rows)
        indices = torch.arange(len(rows)) if weight.indices is None else weight.indices.long()
        indices = indices.to(update.device)
        if self.site.eligible.transposed:
            update[:, indices] += rows[:, start:stop].T - before[:, indices]
            return
        in_block = (indices >= start) & (indices < stop)
        update[indices[in_block] - start] += rows[in_block] - before[indices[in_block] - start]

    def same_as(self, other: Delta) -> bool:
        """Whether both replace the same rows by the same numbers, and add no factors."""
        return not (self.terms or other.terms) and _same_rows(self.own_weight, other.own_weight)


@dataclass(frozen=True, eq=False)
class BiasDelta(Delta):
    """What the adapter adds to the bias of one site."""

    @classmethod
    def of(cls, delta: Delta) -> BiasDelta | None:
        """None if the adapter does not change the site's bias."""
        shifted = any(term.factors.shift is not None for term in delta.terms)
        return cls(delta.site, delta.terms) if shifted else None

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.site.out_features,)

    def update(self, start: int, stop: int, before: Tensor) -> Tensor:
        update = before.new_zeros(self.shape)
        for term in self.terms:
            if term.factors.shift is not None:
                update[term.columns] += _cast_like(update, term.factors.shift)
        return update[start:stop]


def _add_product(target: Tensor, rows: Tensor, columns: Tensor, scale: Tensor | float) -> None:
    """target (N, K) += scale · rowsᵀ columns, with rows (r, N) and columns (r, K)."""
    target.addmm_(_cast_like(target, rows).T, _cast_like(target, columns), alpha=float(scale))


def _cast_like(like: Tensor, factor: Tensor) -> Tensor:
    return factor.to(device=like.device, dtype=like.dtype)


def _same_rows(a: OwnWeight | None, b: OwnWeight | None) -> bool:
    if a is None or b is None:
        return a is b
    if a.bias is not None or b.bias is not None or a.rows.shape != b.rows.shape:
        return False
    if a.indices is None or b.indices is None:
        return a.indices is b.indices and torch.equal(a.rows, b.rows)
    return torch.equal(a.indices, b.indices) and torch.equal(a.rows, b.rows)


def deltas_of(groups: Sequence[Group], stored: StoredAdapter) -> list[Delta]:
    numbers = stored.numbers
    terms: dict[int, list[DeltaTerm]] = {}
    sites: dict[int, Site] = {}
    for number, factors in numbers.factors.items():
        group = groups[number]
        for f in factors:
            site = group.site_of(f.sibling)
            first = group.offsets[group.sites.index(site)]
            sites[id(site)] = site
            terms.setdefault(id(site), []).append(DeltaTerm(f, f.offset - first))
    replaced: dict[int, OwnWeight] = {}
    for number in (*numbers.own_weights, *numbers.changed):
        weight = numbers.own_weight(number, groups[number])
        assert weight is not None
        (site,) = groups[number].sites
        sites[id(site)], replaced[id(site)] = site, weight
    return [Delta(site, tuple(terms.get(k, ())), replaced.get(k)) for k, site in sites.items()]


def blocks(shape: Sequence[int], device: torch.device) -> Iterator[tuple[int, int]]:
    """Ranges of the first dimension of a tensor of this shape, at least one row in each."""
    rows, row_bytes = shape[0], 4 * math.prod(shape[1:])
    step = max(1, (BLOCK_ON_CPU if device.type == "cpu" else BLOCK) // row_bytes)
    for start in range(0, rows, step):
        yield start, min(start + step, rows)


def compute_dtype(weight: Tensor) -> torch.dtype:
    return torch.float64 if weight.dtype == torch.float64 else torch.float32


_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@torch.no_grad()
def add_to(target: Tensor, weight: Tensor, delta: Delta, label: str) -> float:
    """target ← round(weight + ΔW). Returns ‖(target − weight) − ΔW‖ / ‖ΔW‖. Raises MatchError for a
    sum beyond the range of the dtype, after which `target` may be partly written."""
    dtype = compute_dtype(weight)
    lost = total = 0.0
    for start, stop in blocks(weight.shape, weight.device):
        before = weight.detach()[start:stop].to(dtype, copy=True)
        update = delta.update(start, stop, before)
        after = (before + update).to(weight.dtype)
        error = after.to(dtype, copy=True).sub_(before).sub_(update)
        norms = torch.stack([torch.linalg.vector_norm(error), torch.linalg.vector_norm(update)])
        error_norm, update_norm = norms.tolist()  # one transfer a block
        if not math.isfinite(error_norm):
            overflown = ~torch.isfinite(after) & torch.isfinite(before)
            if bool(overflown.any()):
                raise MatchError(
                    f"{label}: W + ΔW is beyond the range of {weight.dtype}; nothing is merged"
                )
        lost, total = lost + error_norm**2, total + update_norm**2
        write(target.detach()[start:stop], after)
    return (lost / total) ** 0.5 if total else 0.0


def write(target: Tensor, value: Tensor) -> None:
    with writing(target):
        target.detach().copy_(value)


@torch.no_grad()
def checksum(tensor: Tensor) -> int:
    """The sum of the bits of all numbers: torch's version counters miss writes through `.data`."""
    bits = tensor.detach().view(_BITS[tensor.element_size()])
    words = 8 // bits.element_size()
    if bits.is_contiguous() and not bits.numel() % words and not bits.storage_offset() % words:
        bits = bits.reshape(-1).view(torch.int64)  # summed without a conversion: much faster
    return int(bits.sum(dtype=torch.int64))
