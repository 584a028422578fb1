"""The store: adapters in host memory by name, and which of them hold a slot of the banks.

    load      checkpoint factors -> host copies in the banks' dtype and layout
    acquire   the names of a batch's rows -> slots; missing adapters are written into free slots,
              or over the least recently used adapter that is neither pinned nor in the batch

Banks are written in place, so compiled graphs and captured addresses stay valid. Everything is
checked before the first write; a call that raises has changed nothing.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from lorafx.adapter_store.bank import Factors
from lorafx.adapter_store.dora import measure
from lorafx.errors import (
    CapacityError,
    CheckpointError,
    ConfigError,
    UnknownAdapterError,
    nearest,
)

if TYPE_CHECKING:
    from lorafx.adapter_store.peft_reader import Adapter
    from lorafx.adapter_store.reading import LoraWeights
    from lorafx.model.sites import Group, Site

BASE = "__base__"


@dataclass(frozen=True)
class StoredAdapter:
    """An adapter in host memory.

    Attributes:
        name, rank, source: as in `Adapter`.
        sites: canonical paths of the sites that it touches.
        rescaled: those of them whose outputs it rescales (DoRA).
        spans: as in `Adapter`.
        factors: index of a group -> that group's factors, in its bank's dtype and layout.
        nbytes: host memory that the factors take.
    """

    name: str
    rank: int
    source: str
    sites: tuple[str, ...]
    factors: dict[int, list[Factors]]
    nbytes: int
    rescaled: tuple[str, ...] = ()
    spans: Mapping[str, range] = field(default_factory=dict)


class AdapterStore:
    """Adapters by name over the banks of `groups`; safe to use from several threads.

    Args:
        groups: the groups whose banks are filled; each bank has `max_adapters` slots.
        max_adapters: slots, the most distinct adapters in one batch.
        max_rank: largest rank that the banks hold.
    """

    def __init__(self, groups: Sequence[Group], max_adapters: int, max_rank: int) -> None:
        self._groups = tuple(groups)
        self._max_adapters, self._max_rank = max_adapters, max_rank
        self._places = {
            site.part_path(part): _Place(g, site, part, *numbers)
            for g, group in enumerate(self._groups)
            for i, site in enumerate(group.sites)
            for part, numbers in enumerate(zip(*group.ranges(i)[:2], strict=True))
        }
        self._lock = threading.RLock()
        self._adapters: dict[str, StoredAdapter] = {}
        self._slots: OrderedDict[str, int] = OrderedDict()  # least recently used first
        self._pinned: set[str] = set()
        self._last: tuple[tuple[str | None, ...], tuple[int, ...]] | None = None
        self._written: set[int] | None = None  # slots, inside `set_aside`

    @property
    def names(self) -> tuple[str, ...]:
        """Loaded adapters, in order of loading."""
        with self._lock:
            return tuple(self._adapters)

    @property
    def resident(self) -> dict[str, int]:
        """Adapters that hold a slot -> the slot, least recently used first."""
        with self._lock:
            return dict(self._slots)

    @property
    def pinned(self) -> frozenset[str]:
        """Adapters that keep their slot until unpinned or unloaded."""
        with self._lock:
            return frozenset(self._pinned)

    def __contains__(self, name: object) -> bool:
        with self._lock:
            return name in self._adapters

    def __getitem__(self, name: str) -> StoredAdapter:
        """The stored adapter; UnknownAdapterError if there is none of this name."""
        with self._lock:
            self._check_known([name])
            return self._adapters[name]

    def load(self, adapter: Adapter) -> None:
        """Keep `adapter` in host memory; it gets a slot when a batch, or a pin, asks for it.

        An adapter of the same name is replaced, and rewritten in place if it holds a slot.
        Raises CapacityError (rank, no room for DoRA), CheckpointError (sites, shapes, values beyond
        the banks' dtype) or ConfigError (name).
        """
        check_name(adapter.name)
        stored = self._stored(adapter)
        with self._lock:
            self._check_spans(stored)
            if adapter.name in self._slots:
                self._write(self._slots[adapter.name], stored)
            self._adapters[adapter.name] = stored

    def unload(self, name: str) -> None:
        """Forget an adapter, pinned or not, and free its slot."""
        with self._lock:
            self._check_known([name])
            slot = self._slots.pop(name, None)
            if slot is not None:
                self._clear(slot)
            self._pinned.discard(name)
            del self._adapters[name]
            self._last = None

    def pin(self, name: str) -> int:
        """Give an adapter a slot that it keeps until unpinned; returns the slot."""
        with self._lock:
            self._check_known([name])
            (slot,) = self.acquire([name])
            self._pinned.add(name)
            return slot

    def unpin(self, name: str) -> None:
        """Let an adapter be evicted again; nothing happens if it was not pinned."""
        with self._lock:
            self._check_known([name])
            self._pinned.discard(name)

    @contextmanager
    def set_aside(self) -> Iterator[None]:
        """An empty store inside the block; afterwards everything is as it was, in the same slots.

        Other threads that ask for the store wait. Slots that were written inside are written again
        with what they held, or cleared.
        """
        with self._lock:
            before = self._adapters, self._slots, self._pinned, self._last
            self._adapters, self._slots, self._pinned, self._last = {}, OrderedDict(), set(), None
            written: set[int] = set()
            self._written = written
            try:
                yield
            finally:
                self._written = None
                self._adapters, self._slots, self._pinned, self._last = before
                holders = {slot: name for name, slot in self._slots.items()}
                for slot in written:
                    if slot in holders:
                        self._write(slot, self._adapters[holders[slot]])
                    else:
                        self._clear(slot)

    def acquire(self, names: Sequence[str | None]) -> list[int]:
        """The slot of each row's adapter, -1 for None and "__base__".

        Raises UnknownAdapterError for names that are not loaded, CapacityError when the batch
        has more distinct adapters than there are slots, or than pinned ones leave free.
        """
        key = tuple(names)
        with self._lock:
            if self._last is not None and self._last[0] == key:
                return list(self._last[1])  # decoding asks for the same rows step after step
            wanted = list(dict.fromkeys(n for n in key if n is not None and n != BASE))
            self._check_known(wanted)
            self._make_resident(wanted)
            for name in wanted:
                self._slots.move_to_end(name)
            slots = [-1 if n is None or n == BASE else self._slots[n] for n in key]
            self._last = key, tuple(slots)
            return slots

    def refresh_magnitudes(self) -> None:
        """Take the norms of all loaded DoRA adapters again from the base weights as they are now.

        For whoever changes base weights: host copies and slots are rewritten in place, so graphs
        stay. Nothing is done where no adapter is DoRA.

        Raises:
            ConfigError: a base weight is in no known format any more.
        """
        with self._lock:
            dora = {name: stored for name, stored in self._adapters.items() if stored.rescaled}
            for g, group in enumerate(self._groups):
                measure(group, [f for stored in dora.values() for f in stored.factors.get(g, ())])
            for name, stored in dora.items():
                for g, factors in stored.factors.items():
                    if name in self._slots:
                        self._groups[g].bank.write_gains(self._slots[name], factors)

    def nbytes(self) -> dict[str, int]:
        """Bytes of the banks ("banks") and of the adapters in host memory ("host")."""
        with self._lock:
            return {
                "banks": sum(group.bank.nbytes for group in self._groups),
                "host": sum(stored.nbytes for stored in self._adapters.values()),
            }

    def _make_resident(self, wanted: list[str]) -> None:
        missing = [name for name in wanted if name not in self._slots]
        if not missing:
            return
        if len(wanted) > self._max_adapters:
            raise CapacityError(
                f"the batch has {len(wanted)} distinct adapters ({', '.join(wanted)}) and there "
                f"are {self._max_adapters} slots; split the batch or compile with "
                f"LoraConfig(max_adapters={len(wanted)})"
            )
        free = [s for s in range(self._max_adapters) if s not in set(self._slots.values())]
        evictable = [n for n in self._slots if n not in wanted and n not in self._pinned]
        if len(missing) > len(free) + len(evictable):
            kept = sorted(self._pinned - set(wanted))
            raise CapacityError(
                f"no slots for {', '.join(missing)}: {self._max_adapters} slots, of which "
                f"{', '.join(kept)} are pinned; unpin_adapter() some, split the batch, or "
                "compile with a larger LoraConfig(max_adapters=...)"
            )
        self._last = None
        for name in missing:
            slot = free.pop(0) if free else self._slots.pop(evictable.pop(0))
            # Between here and the assignment the slot belongs to nobody: if the device fails
            # in the middle, the store still tells the truth.
            self._write(slot, self._adapters[name])
            self._slots[name] = slot

    def _write(self, slot: int, stored: StoredAdapter) -> None:
        if self._written is not None:
            self._written.add(slot)
        for g, group in enumerate(self._groups):
            factors = stored.factors.get(g)
            if factors:
                group.bank.write(slot, factors)
            else:
                group.bank.clear(slot)

    def _clear(self, slot: int) -> None:
        for group in self._groups:
            group.bank.clear(slot)

    def _check_known(self, names: Sequence[str]) -> None:
        unknown = [name for name in names if name not in self._adapters]
        if unknown:
            said = "; ".join(f"{n!r}{nearest(str(n), self._adapters)}" for n in unknown)
            raise UnknownAdapterError(
                f"no adapter named {said}; loaded: {', '.join(self._adapters) or 'none'}"
            )

    def _stored(self, adapter: Adapter) -> StoredAdapter:
        if adapter.rank > self._max_rank:
            raise CapacityError(
                f"adapter {adapter.name!r} has rank {adapter.rank}, over max_rank = "
                f"{self._max_rank}; compile with LoraConfig(max_rank={adapter.rank})"
            )
        if adapter.magnitudes and all(group.bank.gains is None for group in self._groups):
            raise CapacityError(
                f"adapter {adapter.name!r} is DoRA, for which there is no room; compile with "
                "LoraConfig(use_dora=True), or give the adapter when compiling"
            )
        factors: dict[int, list[Factors]] = {}
        problems: list[str] = []
        for path, weights in adapter.weights.items():
            place = self._places.get(path)
            if place is None:
                problems.append(f"{path} is not a site{nearest(path, self._places)}")
                continue
            problem = _misfit(path, place, weights, self._max_rank)
            if problem:
                problems.append(problem)
                continue
            made = _sharing(self._factors(place, weights), factors.get(place.group, ()))
            factors.setdefault(place.group, []).append(made)
            if not all(bool(torch.isfinite(t).all()) for t in (made.A, made.B)):
                problems.append(f"{path}: values beyond the range of {made.A.dtype}")
        if problems:
            raise CheckpointError(
                f"adapter {adapter.name!r} from {adapter.source} does not fit the banks:\n"
                + "\n".join(f"  - {problem}" for problem in problems)
            )
        for g, own in factors.items():
            measure(self._groups[g], own)
        tensors = [t for f in _all(factors) for t in (f.A, f.B, f.magnitude, f.gains)]
        size = sum({id(t): t.nbytes for t in tensors if t is not None}.values())
        sites = dict.fromkeys(self._places[path].site.path for path in adapter.weights)
        rescaled = dict.fromkeys(self._places[path].site.path for path in adapter.magnitudes)
        names = adapter.name, adapter.rank, adapter.source
        return StoredAdapter(*names, tuple(sites), factors, size, tuple(rescaled), adapter.spans)

    def _check_spans(self, stored: StoredAdapter) -> None:
        """A name of a packed module means the same slices in all adapters."""
        for other in self._adapters.values():
            for path in stored.spans.keys() & other.spans.keys():
                mine, theirs = stored.spans[path], other.spans[path]
                if mine != theirs and other.name != stored.name:
                    raise CheckpointError(
                        f"adapter {stored.name!r} from {stored.source} has factors by whose rows "
                        f"{path} is slices {_listed(mine)} of what packs it, and by those of "
                        f"{other.name!r} slices {_listed(theirs)}: one of the two is for another "
                        "model; packed_modules may say which slices each name covers"
                    )

    def _factors(self, place: _Place, weights: LoraWeights) -> Factors:
        group = self._groups[place.group]
        a = weights.A.t() if group.bank.kind == "embedding" else weights.A
        pin = group.bank.A.is_cuda
        magnitude = weights.magnitude
        if magnitude is not None:
            magnitude = _host_copy(magnitude, torch.float32, pin=False)
        return Factors(
            place.sibling,
            place.offset,
            _host_copy(a, group.bank.A.dtype, pin),
            _host_copy(weights.B.mT, group.bank.B.dtype, pin),
            weights.scale,
            weights.ranks,
            magnitude,
            None if magnitude is None else torch.zeros_like(magnitude),
        )


def _sharing(made: Factors, others: Iterable[Factors]) -> Factors:
    """`made`, holding the very A of another sibling that has the same."""
    for other in others:
        if other.A.shape == made.A.shape and torch.equal(other.A, made.A):
            return made._replace(A=other.A)
    return made


def check_name(name: object) -> None:
    """Raise ConfigError unless `name` can name an adapter."""
    if not isinstance(name, str) or not name or name == BASE:
        raise ConfigError(
            f"an adapter's name is a non-empty string other than {BASE!r}, got {name!r}"
        )


def _listed(numbers: Iterable[int]) -> str:
    return ", ".join(map(str, numbers))


class _Place(NamedTuple):
    """Where the factors of one part of a site lie: its sibling and first column in the bank."""

    group: int
    site: Site
    part: int
    sibling: int
    offset: int


def _misfit(path: str, place: _Place, weights: LoraWeights, max_rank: int) -> str | None:
    rank, part = weights.rank, place.site.parts[place.part]
    want: tuple[tuple[int, ...], ...] = (rank, part.in_features), (part.out_features, rank)
    if place.site.expert_weight is not None:
        want = tuple((place.site.experts, *shape) for shape in want)
    max_rank *= place.site.terms
    have = tuple(weights.A.shape), tuple(weights.B.shape)
    if have != want or not 0 < rank <= max_rank:
        return f"{path}: factors {have} do not fit {want} with rank at most {max_rank}"
    return None


def _host_copy(tensor: Tensor, dtype: torch.dtype, pin: bool) -> Tensor:
    """A contiguous copy on the host, page-locked where it is to be copied to a GPU."""
    made = torch.empty(tensor.shape, dtype=dtype, device="cpu", pin_memory=pin)
    return made.copy_(tensor.detach())


def _all(factors: dict[int, list[Factors]]) -> Iterator[Factors]:
    for group in factors.values():
        yield from group
