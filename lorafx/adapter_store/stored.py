"""Decoded adapters, and adapters in host memory, in the dtype and layout of the banks, within a
budget of bytes: those for which it has no room are read again from their files.

DoRA's scale of each output is computed once per adapter, in float32, from the bank's factors and
the dequantised base weight:

    y' = c + m / ‖W + s·B A‖ · (W x + s·B A x)        gains = m / ‖W + s·B A‖ − 1    (N,)

The norm is over the inputs of each output: rows of W (N, K); columns of an embedding's (V, N). An
output whose W + s·B A is zero is not scaled.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lorafx.adapter_store.changed_weight import ChangedWeight
from lorafx.adapter_store.saved import AdapterSource, Origin
from lorafx.errors import LorafxError
from lorafx.model.bank import Factors, OwnWeight
from lorafx.model.convolutions import norm_factors
from lorafx.model.extras import When, bias_of
from lorafx.model.quantized import dequantize
from lorafx.model.sites import Group, Site

next_version = itertools.count(1).__next__
#: Entries of W + s·B A in memory at a time.
_CHUNK = 1 << 22


class LoraWeights(NamedTuple):
    """A part's A (r, K), B (N, r) and s; (N,) DoRA's `magnitude`, lora_B's `bias`, a new
    `own_bias`.

    Routed experts: A (E, r, K), B (E, N, r), s and `ranks` (E,), 0 for untouched experts.
    """

    A: Tensor
    B: Tensor
    scale: float | Tensor
    ranks: Tensor | None = None
    magnitude: Tensor | None = None
    bias: Tensor | None = None
    own_bias: Tensor | None = None

    @property
    def rank(self) -> int:
        return self.B.shape[-1]


@dataclass(frozen=True)
class Adapter:
    """A decoded adapter.

    Attributes:
        weights: `Site.part_path` -> factors; untouched parts are absent.
        own_weights: site path -> rows of its weight that the adapter replaces.
        changed: site path -> what makes the adapter's weight of the base's.
        replaces_biases: the adapter was trained with biases that replace the base's.
        compared: the file has copies of base weights, which were compared with the model's.
        invocation: the tokens that activate it (aLoRA); empty if it is always active.
    """

    name: str
    weights: dict[str, LoraWeights]
    rank: int
    source: str
    own_weights: Mapping[str, OwnWeight] = field(default_factory=dict)
    changed: Mapping[str, ChangedWeight] = field(default_factory=dict)
    replaces_biases: bool = False
    compared: bool = False
    invocation: tuple[int, ...] = ()

    @property
    def extras(self) -> dict[When, tuple[str, ...]]:
        """The parts and sites with `EXTRAS`, by their names."""
        parts = self.weights.items()
        return {
            "dora": tuple(path for path, w in parts if w.magnitude is not None),
            "own": (*self.own_weights, *self.changed),
            "bias": tuple(p for p, w in parts if w.bias is not None or w.own_bias is not None),
        }


@dataclass(frozen=True, eq=False)
class HostCopy:
    """An adapter's factors, replaced rows and changed weights by group index, and their
    `Bank.tables` since it was first written into a slot."""

    factors: Mapping[int, Sequence[Factors]]
    own_weights: Mapping[int, OwnWeight] = field(default_factory=dict)
    changed: Mapping[int, ChangedWeight] = field(default_factory=dict)
    tables: dict[int, Mapping[str, Tensor]] = field(default_factory=dict)

    def own_weight(self, number: int, group: Group) -> OwnWeight | None:
        """What the adapter has in place of the group's weight, made of the current one if it is a
        function of that."""
        changed = self.changed.get(number)
        return self.own_weights.get(number) if changed is None else made_weight(group, changed)

    @property
    def adds(self) -> bool:
        """Whether all that it has is added to what the base computes, so a sum may have it."""
        return not self.own_weights and all(c.adds for c in self.changed.values())

    def in_slot(self, number: int, group: Group) -> OwnWeight | None:
        """As `own_weight`, but the numbers of its structure if it has one, and rows of a linear
        with its delta."""
        changed = self.changed.get(number)
        if changed is None or changed.structure is None:
            weight = self.own_weight(number, group)
            embedding = group.bank.kind == "embedding"
            return weight if weight is None or embedding else self._with_delta(number, weight)
        (site,) = group.sites
        numbers = changed.numbers(site.out_features, site.in_features)
        return OwnWeight(numbers, structure=changed.structure)

    def _with_delta(self, number: int, weight: OwnWeight) -> OwnWeight:
        rows = weight.rows  # on the base's device if they were made of its weight
        for f in self.factors.get(number, ()):
            outputs = f.B if weight.indices is None else f.B[:, weight.indices.long()]
            b, a = (factor.to(rows.device, torch.float32) for factor in (outputs, f.A))
            rows = torch.addmm(rows.float(), b.mT, a, alpha=float(f.scale))
        return weight._replace(rows=rows)

    @cached_property
    def nbytes(self) -> int:
        parts: list[Iterable[Any]] = [*itertools.chain(*self.factors.values())]
        parts += [*self.own_weights.values(), *(made.tensors for made in self.changed.values())]
        tensors = (value for part in parts for value in part if isinstance(value, Tensor))
        return sum({id(t): t.nbytes for t in tensors}.values())


@dataclass(eq=False)
class StoredAdapter:
    """A loaded adapter, or a sum. Only its host copy may be dropped and read again.

    Attributes:
        host: its numbers; None if they were dropped for the budget.
        extras: sites with `EXTRAS`, by their names.
        origin: its files, with the settings for reading them; None from memory and from the hub.
        compared: as in `Adapter`.
        width: how many consecutive slots it takes.
        memory: reads its files again.
        used: a number that grows with each fetch of any adapter.
        reread: it was read again, and has not been written into a slot since.
        version: unique in this process, from 1 on.
    """

    name: str
    rank: int
    source: str
    sites: tuple[str, ...]
    host: HostCopy | None
    extras: Mapping[When, tuple[str, ...]] = field(default_factory=dict)
    invocation: tuple[int, ...] = ()
    origin: Origin | None = None
    compared: bool = False
    width: int = 1
    memory: HostMemory | None = None
    used: int = 0
    reread: bool = False
    version: int = field(default_factory=next_version)

    @property
    def numbers(self) -> HostCopy:
        """The host copy, read again if it was dropped. Raises as `HostMemory.read`."""
        copy = self.host
        if copy is None:
            assert self.memory is not None
            copy = self.host = self.memory.read(self)
        return copy

    @property
    def depends_on_base(self) -> bool:
        """Whether some of its numbers have to be recomputed when base weights change."""
        changed = () if self.host is None else self.host.changed.values()
        made = any(weight.structure is None for weight in changed)
        return bool(made or self.extras.get("dora") or self.extras.get("bias"))

    @property
    def can_be_dropped(self) -> bool:
        return self.origin is not None and not self.compared and not self.depends_on_base

    @property
    def owned(self) -> tuple[str, ...]:
        """The sites whose weight it replaces, at least in part."""
        return self.extras.get("own", ())


class Hold:
    """Keeps a version of an adapter loaded under `name`, and its numbers (`AdapterStore.hold`)."""

    def __init__(self, name: str, stored: StoredAdapter) -> None:
        self.name, self.stored, self.numbers = name, stored, stored.numbers

    def __deepcopy__(self, memo: object) -> Hold:
        """What is copied has the same hold."""
        return self


class Kept:
    """Keeps adapters in host memory while it lives, such as in a `with` (`AdapterStore.fetch`)."""

    def __init__(self, adapters: Sequence[StoredAdapter] = ()) -> None:
        self.adapters = adapters

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...


class HostMemory:
    """Reads dropped adapters again, and counts such events.

    Attributes:
        budget: bytes of host memory for adapters; None for no limit.
        hits: how often an adapter that got a slot was in host memory.
        misses, changed, evictions: how often one was read again, was not readable, was dropped.
        reader: reads an adapter from a source, by its name; no adapter is dropped without it.
        grown: host memory may be over the budget.
    """

    def __init__(self, fit: Callable[[Adapter], StoredAdapter], budget: int | None) -> None:
        self.budget = budget
        self.hits = self.misses = self.changed = self.evictions = 0
        self.reader: Callable[[AdapterSource, str], Adapter] | None = None
        self.grown = True
        self._fit = fit

    def read(self, stored: StoredAdapter) -> HostCopy:
        """Raises CheckpointError if a file has changed since it was loaded, or is unreadable."""
        origin, reader = stored.origin, self.reader
        assert origin is not None
        assert reader is not None
        self.misses += 1
        try:
            origin.check(stored.name)
            copy = self._fit(reader(origin.source, stored.name)).host
            origin.check(stored.name)  # it may have changed during the read
        except LorafxError:
            self.changed += 1
            raise
        assert copy is not None
        stored.reread = self.grown = True
        return copy


class Retired(str):
    """The private name of a version that was `replaced` or unloaded; equal only to itself."""

    replaced: str

    def __new__(cls, stored: StoredAdapter) -> Retired:
        name = super().__new__(cls, f"{stored.name} (version {stored.version}, replaced)")
        name.replaced = stored.name
        return name

    def __eq__(self, other: object) -> bool:
        return self is other

    def __ne__(self, other: object) -> bool:
        return self is not other

    def __hash__(self) -> int:
        return id(self)


def host_copy(tensor: Tensor, dtype: torch.dtype, pin: bool) -> Tensor:
    """A contiguous copy on the host, page-locked if `pin`."""
    copy = torch.empty(tensor.shape, dtype=dtype, device="cpu", pin_memory=pin)
    return copy.copy_(tensor.detach())


@torch.no_grad()
def made_weight(group: Group, changed: ChangedWeight) -> OwnWeight:
    """W′ of the group's one site, of the current base weight."""
    (site,) = group.sites
    weight, bias = dequantize(site.module).detach(), bias_of(site)
    weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
    before = weight.new_zeros(len(weight)) if bias is None else bias.to(weight)
    after = changed.own_bias(before, weight)
    none = bias is None and not bool(after.any())
    return OwnWeight(changed.weight(weight), None if none else after)


@torch.no_grad()
def measure(group: Group, factors: Iterable[Factors]) -> None:
    """Write gains, and shifts s·b + b' − b, in place. Raises ConfigError for an unknown format."""
    factors = list(factors)
    for site, offset in zip(group.sites, group.offsets, strict=True):
        site_factors = [f for f in factors if offset <= f.offset < offset + site.out_features]
        base = bias_of(site) if any(f.own_bias is not None for f in site_factors) else None
        for f in site_factors:
            if f.shift is None:
                continue
            shift = torch.zeros(f.B.shape[-1])
            if f.bias is not None:
                shift += f.scale * f.bias
            if f.own_bias is not None:
                assert base is not None
                start = f.offset - offset
                shift += f.own_bias - base[start : start + len(shift)].cpu().float()
            f.shift.copy_(shift)
        if any(f.gains is not None for f in site_factors):
            weight = dequantize(site.module).detach()  # (N, K), embeddings transposed
            weight = weight.mT if site.eligible.kind == "embedding" else weight
            for f in site_factors:
                if f.gains is not None:
                    f.gains.copy_(_gains(site, weight, f.offset - offset, f))


def _gains(site: Site, weight: Tensor, first: int, f: Factors) -> Tensor:
    """G (N,) float32 on the host, of outputs [first, first + N)."""
    assert f.magnitude is not None
    part = weight[first : first + f.B.shape[-1]]
    A = f.A.mT if site.eligible.kind == "embedding" else f.A
    A, B = (tensor.to(part.device, torch.float32) for tensor in (A, f.B.mT))
    if site.eligible.kind == "conv":
        A, B = norm_factors(site.module, A, B)
    squares = torch.zeros(len(part), dtype=torch.float32, device=part.device)
    for rows, columns in _chunks(part):
        merged = part[rows, columns].float() + f.scale * (B[rows] @ A[:, columns])
        squares[rows] += merged.square().sum(1)
    norm = squares.sqrt().cpu()
    return torch.where(norm > 0, f.magnitude / norm - 1, 0.0)


def _chunks(weight: Tensor) -> Iterator[tuple[slice, slice]]:
    dim = 0 if weight.stride(0) >= weight.stride(1) else 1
    step = max(1, _CHUNK // max(1, weight.shape[1 - dim]))
    for start in range(0, weight.shape[dim], step):
        piece = slice(start, start + step)
        yield (piece, slice(None)) if dim == 0 else (slice(None), piece)
