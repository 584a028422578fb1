"""What an adapter adds to each base tensor, as the tensor is stored, and adding it in place.

    linear (N, K)            ΔW[o : o + n]       = s · Bᵀ A        A (r, K), B (r, n)
    linear (K, N)            ΔW[:, o : o + n]    = s · Aᵀ B
    embedding (V, N)         ΔW                  = s · A B         A (V, r), B (r, N)
    convolution (N, C, k…)   ΔW as of a linear, its kernels as rows
    experts (E, N, K)        ΔW[e, o : o + n]    = s_e · B_eᵀ A_e  A (E, r, K), B (E, r, n)
    experts (E, K, N)        ΔW[e, :, o : o + n] = s_e · A_eᵀ B_e
    DoRA                     (1 + G) ⊙ (W + ΔW) − W, by output (lorafx.adapter_store.stored)
    rows of its own          W_own − W + ΔW, in those rows
    bias (N,)                s·b + b' − b, by output (`BiasDelta`)
    quantised weights        requantise(dequantise(W) + ΔW), where asked for

o is the first output column of a part of the site. Factors are this rank's share, in the banks'
dtype. ΔW is computed a few rows at a time, in float32 (float64 for a float64 weight).

Views of a weight (packed buffers, W_UK) change with it. A tied tensor can be changed where every
end gets the same ΔW. Everything that cannot be changed is found for all sites at once, before
anything is written.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lorafx.adapter_store.stored import StoredAdapter
from lorafx.errors import MatchError
from lorafx.model.bank import Factors, OwnWeight
from lorafx.model.convolutions import unmergeable, weight_shape
from lorafx.model.module_graph import storage_key, writing
from lorafx.model.quantized import is_stored
from lorafx.model.sites import Group, Site
from lorafx.program.derived import Holder, named_tensors, overlap
from lorafx.registry import lookup

if TYPE_CHECKING:
    from lorafx.adapter_store.store import AdapterStore
    from lorafx.program.program import Program

#: Bytes of ΔW that are computed at once: on a CPU a cache's worth.
BLOCK_ON_CPU, BLOCK = 1 << 22, 1 << 26


@dataclass(frozen=True)
class DeltaTerm:
    """The factors of one part of a site, and the part's first output column there."""

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
    own: OwnWeight | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        site = self.site
        if site.eligible.kind == "conv":
            return weight_shape(site.module)
        pair = (site.out_features, site.in_features)
        if site.eligible.transposed or site.eligible.kind == "embedding":
            pair = pair[::-1]
        return pair if site.expert_weight is None else (site.experts, *pair)

    def block(self, start: int, stop: int, like: Tensor) -> Tensor:
        """Rows [start, stop) of ΔW as it is stored, on the device and in the dtype of `like`."""
        made = like.new_zeros((stop - start, *self.shape[1:]))
        add = _add_rows if self.site.expert_weight is None else _add_experts
        for term in self.terms:
            add(self.site, term, made, start, stop)
        return made

    def update(self, start: int, stop: int, before: Tensor) -> Tensor:
        """What is added to rows [start, stop), which hold `before`: ΔW, DoRA's scale, own rows."""
        made = self.block(start, stop, before)
        if self.own is not None:
            self._exchange(self.own, made, start, stop, before)
        turned = self.site.eligible.transposed or self.site.eligible.kind == "embedding"
        for term in self.terms:
            if term.factors.gains is None:
                continue
            gains, columns = _on(made, term.factors.gains), term.columns
            if turned:
                made[:, columns] += gains * (before[:, columns] + made[:, columns])
                continue
            low, high = max(start, columns.start), min(stop, columns.stop)
            if low < high:
                rows, gains = slice(low - start, high - start), gains[low - columns.start :]
                gains = gains[: high - low].view(-1, *[1] * (made.dim() - 1))
                made[rows] += gains * (before[rows] + made[rows])
        return made

    def _exchange(
        self, own: OwnWeight, made: Tensor, start: int, stop: int, before: Tensor
    ) -> None:
        rows = _on(made, own.rows)
        at = torch.arange(len(rows)) if own.indices is None else own.indices.long()
        at = at.to(made.device)
        if self.site.eligible.transposed:
            made[:, at] += rows[:, start:stop].T - before[:, at]
            return
        here = (at >= start) & (at < stop)
        made[at[here] - start] += rows[here] - before[at[here] - start]

    def same_as(self, other: Delta) -> bool:
        """Whether both replace the same rows by the same numbers, and add no factors."""
        return not (self.terms or other.terms) and _same_rows(self.own, other.own)


@dataclass(frozen=True, eq=False)
class BiasDelta(Delta):
    """What the adapter adds to the bias of one site."""

    @classmethod
    def of(cls, delta: Delta) -> BiasDelta | None:
        """None where the adapter leaves the site's bias alone."""
        shifted = any(term.factors.shift is not None for term in delta.terms)
        return cls(delta.site, delta.terms) if shifted else None

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.site.out_features,)

    def update(self, start: int, stop: int, before: Tensor) -> Tensor:
        made = before.new_zeros(self.shape)
        for term in self.terms:
            if term.factors.shift is not None:
                made[term.columns] += _on(made, term.factors.shift)
        return made[start:stop]


def _add_rows(site: Site, term: DeltaTerm, made: Tensor, start: int, stop: int) -> None:
    """Add rows [start, stop) of ΔW of a linear, a convolution or an embedding."""
    f, columns = term.factors, term.columns
    if site.eligible.kind == "embedding":
        _add_product(made[:, columns], f.A[start:stop].T, f.B, f.scale)
    elif site.eligible.transposed:
        _add_product(made[:, columns], f.A[:, start:stop], f.B, f.scale)
    else:
        low, high = max(start, columns.start), min(stop, columns.stop)
        if low < high:
            rows = made.flatten(1)[low - start : high - start]  # a view: `made` is contiguous
            _add_product(rows, f.B[:, low - term.start : high - term.start], f.A, f.scale)


def _add_experts(site: Site, term: DeltaTerm, made: Tensor, start: int, stop: int) -> None:
    f, columns = term.factors, term.columns
    for e in range(start, stop):
        rank = f.rank if f.ranks is None else int(f.ranks[e])
        scale = f.scale[e] if isinstance(f.scale, Tensor) else f.scale
        a, b, expert = f.A[e, :rank], f.B[e, :rank], made[e - start]
        if site.eligible.transposed:
            _add_product(expert[:, columns], a, b, scale)
        else:
            _add_product(expert[columns], b, a, scale)


def _add_product(made: Tensor, rows: Tensor, columns: Tensor, scale: Tensor | float) -> None:
    """made (N, K) += scale · rowsᵀ columns, of rows (r, N) and columns (r, K)."""
    made.addmm_(_on(made, rows).T, _on(made, columns), alpha=float(scale))


def _on(like: Tensor, factor: Tensor) -> Tensor:
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
    own: dict[int, OwnWeight] = {}
    for number, weight in numbers.own_weights.items():
        (site,) = groups[number].sites
        sites[id(site)], own[id(site)] = site, weight
    return [Delta(site, tuple(terms.get(key, ())), own.get(key)) for key, site in sites.items()]


def blocks(shape: Sequence[int], device: torch.device) -> Iterator[tuple[int, int]]:
    """Ranges of the first dimension of a tensor of this shape, at least one row in each."""
    rows, row = shape[0], 4 * math.prod(shape[1:])
    step = max(1, (BLOCK_ON_CPU if device.type == "cpu" else BLOCK) // row)
    for start in range(0, rows, step):
        yield start, min(start + step, rows)


def computing(weight: Tensor) -> torch.dtype:
    return torch.float64 if weight.dtype == torch.float64 else torch.float32


_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@torch.no_grad()
def add_to(target: Tensor, weight: Tensor, delta: Delta, label: str) -> float:
    """target ← round(weight + ΔW); returns ‖(target − weight) − ΔW‖ / ‖ΔW‖. MatchError, with
    `target` written in part, for a sum beyond the range of the dtype."""
    dtype = computing(weight)
    lost = whole = 0.0
    for start, stop in blocks(weight.shape, weight.device):
        before = weight.detach()[start:stop].to(dtype, copy=True)
        update = delta.update(start, stop, before)
        after = (before + update).to(weight.dtype)
        wrong = after.to(dtype, copy=True).sub_(before).sub_(update)
        norms = torch.stack([torch.linalg.vector_norm(wrong), torch.linalg.vector_norm(update)])
        block_lost, block_whole = norms.tolist()  # one transfer a block
        if not math.isfinite(block_lost):
            overflown = ~torch.isfinite(after) & torch.isfinite(before)
            if bool(overflown.any()):
                raise MatchError(
                    f"{label}: W + ΔW is beyond the range of {weight.dtype}; nothing is merged"
                )
        lost, whole = lost + block_lost**2, whole + block_whole**2
        write(target.detach()[start:stop], after)
    return (lost / whole) ** 0.5 if whole else 0.0


def write(target: Tensor, value: Tensor) -> None:
    with writing(target):
        target.detach().copy_(value)


@torch.no_grad()
def mark_of(tensor: Tensor) -> int:
    """A sum over the bits of all numbers; torch's count of writes misses those through `.data`."""
    bits = tensor.detach().view(_BITS[tensor.element_size()])
    words = 8 // bits.element_size()
    if bits.is_contiguous() and not bits.numel() % words and not bits.storage_offset() % words:
        bits = bits.reshape(-1).view(torch.int64)  # summed as it is: much faster than widened
    return int(bits.sum(dtype=torch.int64))


@dataclass(frozen=True, eq=False)
class Change:
    """One base tensor that an adapter changes.

    Attributes:
        holder: the module and attribute of the first site that holds it.
        weight: None where the module stores it in a format of its own.
        ends: the holders that use this tensor, or part of it, as their weight, `holder` among
            them, each with its ΔW; several where it is tied.
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
        """The name that `dequantize` takes for one of several weights of a module."""
        return None if self.delta.site.expert_weight is None else self.holder.attribute

    @property
    def tied_apart(self) -> bool:
        """Whether ends get different ΔW, so that one tensor cannot hold the sums."""
        return any(
            delta is not self.delta and (delta is None or not delta.same_as(self.delta))
            for _, delta in self.ends
        )


class _Tensors:
    def __init__(self, program: Program) -> None:
        self._held: dict[int, list[tuple[Holder, Tensor]]] = {}
        for path, module in program.graph.modules():
            for name, value in named_tensors(module):
                held = Holder(path, module, name), value
                self._held.setdefault(storage_key(value), []).append(held)

    def has(self, module: nn.Module, tensor: Tensor) -> bool:
        """Whether the module itself holds the tensor, and does not compute it on each access."""
        found = self._held.get(storage_key(tensor), ())
        return any(holder.module is module and value is tensor for holder, value in found)

    def overlapping(self, weight: Tensor) -> Iterator[tuple[Holder, Tensor]]:
        for holder, tensor in self._held.get(storage_key(weight), ()):
            if tensor is weight or overlap(tensor, weight):
                yield holder, tensor


def changes_of(
    program: Program, store: AdapterStore, name: str, *, requantize: bool = False
) -> list[Change]:
    """What merging the adapter `name` changes, in the order of sites. MatchError names all weights
    that cannot take their ΔW. `requantize`: quantised weights may be stored anew."""
    if store[name].invocation:
        raise MatchError(
            f"adapter {name!r} cannot be merged: it is an aLoRA adapter, which leaves the tokens "
            "before its invocation to the base, so no weight is W + ΔW for all of them. Serve it "
            "without merging"
        )
    order = {id(site): number for number, site in enumerate(program.sites)}
    deltas = deltas_of(program.groups, store[name])
    deltas.sort(key=lambda delta: order[id(delta.site)])
    tensors, problems = _Tensors(program), list[str]()
    for delta in deltas:
        problem = _problem(program, tensors, delta, requantize=requantize)
        if problem:
            problems.append(f"{delta.site.path or 'the root module'}: {problem}")
    if problems:
        raise not_mergeable(name, problems)
    by_end = {key_of(_holder(delta.site)): delta for delta in deltas}
    changes: list[Change] = []
    ended: set[tuple[int, str]] = set()
    for delta in deltas:
        holder = _holder(delta.site)
        of_bias = BiasDelta.of(delta)
        if of_bias is not None:  # a plain one also where the weight is quantised, or tied
            bias = Holder(holder.path, holder.module, "bias")
            changes.append(Change(bias, bias.tensor, of_bias, ((bias, of_bias),)))
        if key_of(holder) in ended:
            continue
        if is_stored(delta.site.module, delta.site.eligible):
            changes.append(Change(holder, None, delta))
            continue
        ends = _ends(program, tensors, holder, by_end)
        ended.update(key_of(end) for end, _ in ends)
        changes.append(Change(holder, holder.tensor, delta, ends))
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


def _problem(program: Program, tensors: _Tensors, delta: Delta, *, requantize: bool) -> str | None:
    site = delta.site
    weight = program.weight_of(site)
    if site.eligible.kind == "conv" and (why := unmergeable(site.module)):
        return f"the adapter adds no change of its weight: {why}"
    if BiasDelta.of(delta) is not None and (why := _fixed_bias(tensors, site)):
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
        if weight is not None and len(list(tensors.overlapping(weight))) > 1:
            return "its weight is quantised and tied to another"
        return None
    if weight is None or not tensors.has(site.module, weight):
        return "its weight is computed on each access (a parametrisation)"
    if delta.own is not None and delta.own.bias is not None:
        held = getattr(site.module, "bias", None)
        if held is None:
            return "the adapter's own weight has fewer outputs"
        if not torch.equal(held.detach().cpu(), delta.own.bias.to(held.dtype)):
            return "the adapter has a bias of its own"
    if tuple(weight.shape) != delta.shape:
        return f"its weight has shape {tuple(weight.shape)}, but ΔW has {delta.shape}"
    return None


def _fixed_bias(tensors: _Tensors, site: Site) -> str | None:
    bias = site.module._parameters.get("bias")
    if bias is None:
        return "the base has no parameter to merge it into"
    others = [str(h) for h, t in tensors.overlapping(bias) if h.module is not site.module]
    return f"{', '.join(others)} is the same tensor as the base's" if others else None


def _ends(
    program: Program,
    tensors: _Tensors,
    holder: Holder,
    by_end: Mapping[tuple[int, str], Delta],
) -> tuple[tuple[Holder, Delta | None], ...]:
    """Holders that use the tensor as a weight, and what each would add; views change with it."""
    sites = {key_of(_holder(site)) for site in program.sites}
    weight, ends = holder.tensor, []
    for other, tensor in tensors.overlapping(weight):
        whole = tensor.shape == weight.shape and tensor.data_ptr() == weight.data_ptr()
        entry = lookup(other.module)
        is_weight = key_of(other) in sites or (
            entry is not None and other.attribute == entry.weight
        )
        is_weight |= whole and other.attribute in other.module._parameters
        if is_weight and (other.module is not holder.module or other.attribute == holder.attribute):
            # A slice of the weight in another module cannot get the same ΔW as the whole.
            ends.append((other, by_end.get(key_of(other)) if whole else None))
    return tuple(ends)
