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

Views of a weight (packed buffers, W_UK) change with it. A tied tensor can be changed if all modules
that use it get the same ΔW. All weights that cannot change are found before anything is written.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lorafx.adapter_store.stored import StoredAdapter
from lorafx.errors import MatchError
from lorafx.model.attachment import marks_on
from lorafx.model.bank import Factors, OwnWeight
from lorafx.model.convolutions import unmergeable, weight_shape
from lorafx.model.made_weights import maker_of
from lorafx.model.marks import SiteMark
from lorafx.model.module_graph import ByStorage, writing
from lorafx.model.quantized import is_stored
from lorafx.model.sites import Group, Site
from lorafx.placements import is_placed, local
from lorafx.program.derived import named_tensors
from lorafx.program.inputs import Holder
from lorafx.registry import lookup

if TYPE_CHECKING:
    from lorafx.adapter_store.store import AdapterStore
    from lorafx.program.program import Program

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
    for number, weight in numbers.own_weights.items():
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


@dataclass(frozen=True, eq=False)
class Change:
    """One base tensor that an adapter changes.

    Attributes:
        holder: the module and attribute of the first site that holds it.
        weight: the tensor; None if the module stores it in a format.
        ends: all holders that use the tensor, or a part of it, as their weight, each with its ΔW;
            several if it is tied.
    """

    holder: Holder
    weight: Tensor | None
    delta: Delta
    ends: tuple[tuple[Holder, Delta | None], ...] = ()

    @property
    def tensor(self) -> Tensor:
        assert self.weight is not None
        return self.weight

    @property
    def parameter(self) -> str | None:
        """The weight's name for `dequantize`, if its module holds several weights."""
        return None if self.delta.site.expert_weight is None else self.holder.attribute

    @property
    def tied_apart(self) -> bool:
        """Whether ends get different ΔW, which one tensor cannot hold."""
        return any(
            delta is not self.delta and (delta is None or not delta.same_as(self.delta))
            for _, delta in self.ends
        )


def _held(program: Program) -> Iterator[tuple[Holder, Tensor]]:
    for path, module in program.graph.modules():
        for name, value in named_tensors(module):
            yield Holder(path, module, name), local(value)


def changes_of(
    program: Program, store: AdapterStore, name: str, *, requantize: bool = False
) -> list[Change]:
    """The changes of merging the adapter `name`, in the order of sites. Raises MatchError, which
    names all weights that cannot be changed. `requantize`: quantised weights may be requantised."""
    if store[name].invocation:
        raise MatchError(
            f"adapter {name!r} cannot be merged: it is an aLoRA adapter, which leaves the tokens "
            "before its invocation to the base, so no weight is W + ΔW for all of them. Serve it "
            "without merging"
        )
    order = {id(site): number for number, site in enumerate(program.sites)}
    deltas = deltas_of(program.groups, store[name])
    deltas.sort(key=lambda delta: order[id(delta.site)])
    tensors, problems = ByStorage(_held(program)), list[str]()
    for delta in deltas:
        problem = _refusal(program, tensors, delta, requantize=requantize)
        if problem:
            problems.append(f"{delta.site.path or 'the root module'}: {problem}")
    if problems:
        raise not_mergeable(name, problems)
    by_end = {key_of(_holder(delta.site)): delta for delta in deltas}
    changes: list[Change] = []
    covered: set[tuple[int, str]] = set()
    for delta in deltas:
        holder = _holder(delta.site)
        bias_delta = BiasDelta.of(delta)
        if bias_delta is not None:  # a plain tensor, even if the weight is quantised or tied
            bias = Holder(holder.path, holder.module, "bias")
            changes.append(Change(bias, bias.local, bias_delta, ((bias, bias_delta),)))
        if key_of(holder) in covered:
            continue
        if is_stored(delta.site.module, delta.site.eligible):
            changes.append(Change(holder, None, delta))
            continue
        ends = _ends(program, tensors, holder, by_end)
        covered.update(key_of(end) for end, _ in ends)
        changes.append(Change(holder, holder.local, delta, ends))
    return changes


def not_mergeable(name: str, problems: Sequence[str]) -> MatchError:
    return MatchError(
        f"adapter {name!r} cannot be merged, and nothing has changed:\n"
        + "\n".join(f"  - {problem}" for problem in problems)
        + "\nServe it without merging, or take these modules out by exclude_modules"
    )


def key_of(holder: Holder) -> tuple[int, str]:
    return id(holder.module), holder.attribute


def _holder(site: Site) -> Holder:
    path = site.path if site.expert_weight is None else site.path.rpartition(".")[0]
    return Holder(path, site.module, site.eligible.weight)


def _refusal(
    program: Program, tensors: ByStorage[Holder], delta: Delta, *, requantize: bool
) -> str | None:
    site = delta.site
    weight = program.weight_of(site)
    weight = None if weight is None else local(weight)
    if site.eligible.kind == "conv" and (why := unmergeable(site.module)):
        return f"the adapter adds no change of its weight: {why}"
    if BiasDelta.of(delta) is not None and (why := _bias_refusal(tensors, site)):
        return f"the adapter adds a bias (lora_bias, bias), and {why}"
    if weight is not None and weight.is_meta:
        return "its weight is on the meta device"
    if site.path in program.replaced:
        return "the module above it computes with a tensor that may have been made from its weight"
    if is_stored(site.module, site.eligible):
        if not requantize:
            return (
                "its weight is quantised; merge(name, requantize=True) stores W + ΔW in "
                "that format and reports how much of ΔW is lost"
            )
        if weight is not None and len(tensors.overlapping(weight)) > 1:
            return "its weight is quantised and tied to another"
        return None
    maker = maker_of(site.module, site.eligible.weight)
    holders = () if weight is None else tensors.beside(weight)
    held = any(h.module is site.module and tensor is weight for h, tensor in holders)
    if maker or weight is None or not held:
        return f"its weight is computed anew for each call, by {maker or 'a property'}"
    if delta.own_weight is not None and delta.own_weight.bias is not None:
        bias = getattr(site.module, "bias", None)
        if bias is None:
            return "the adapter's own weight has fewer outputs"
        if not torch.equal(bias.detach().cpu(), delta.own_weight.bias.to(bias.dtype)):
            return "the adapter has a bias of its own"
    if tuple(weight.shape) != delta.shape:
        return f"its weight has shape {tuple(weight.shape)}, but ΔW has {delta.shape}"
    return _changed_input(program, site) if program.options.delta_of == "argument" else None


def _changed_input(program: Program, site: Site) -> str | None:
    """Why W + ΔW would not be what the adapter adds: the module multiplies by something else than
    its argument. Where no graph shows it, the module is asked."""
    if site.path in program.changed_inputs:
        return (
            "its forward changes its input before it multiplies it by its weight, and the adapter "
            "adds the delta of its argument, which is no change of the weight; compile with "
            'Options(delta_of="weight") if W + ΔW is meant'
        )
    if (
        not site.may_change_input
        or site.path in program.reached
        or is_placed(program.weight_of(site))
    ):
        return None
    if any(
        isinstance(m, SiteMark) and not m.takes_argument(site.module) for m in marks_on(site.marked)
    ):
        return (
            "its class overrides forward, and no graph has shown yet what it multiplies by its "
            "weight; call the model with this adapter first"
        )
    return None


def _bias_refusal(tensors: ByStorage[Holder], site: Site) -> str | None:
    bias = site.module._parameters.get("bias")
    if bias is None:
        return "the base has no parameter to merge it into"
    holders = [str(h) for h, t in tensors.overlapping(bias) if h.module is not site.module]
    return f"{', '.join(holders)} is the same tensor as the base's" if holders else None


def _ends(
    program: Program,
    tensors: ByStorage[Holder],
    holder: Holder,
    by_end: Mapping[tuple[int, str], Delta],
) -> tuple[tuple[Holder, Delta | None], ...]:
    """The holders that use the tensor of `holder` as a weight, each with its ΔW."""
    site_keys = {key_of(_holder(site)) for site in program.sites}
    weight, ends = holder.local, []
    for other, tensor in tensors.overlapping(weight):
        is_whole = tensor.shape == weight.shape and tensor.data_ptr() == weight.data_ptr()
        entry = lookup(other.module)
        is_weight = key_of(other) in site_keys or (
            entry is not None and other.attribute == entry.weight
        )
        is_weight |= is_whole and other.attribute in other.module._parameters
        if is_weight and (other.module is not holder.module or other.attribute == holder.attribute):
            # A slice of the weight in another module cannot get the same ΔW as the whole.
            ends.append((other, by_end.get(key_of(other)) if is_whole else None))
    return tuple(ends)
