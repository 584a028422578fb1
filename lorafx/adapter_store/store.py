"""The store: adapters in host memory by name, and the slots of the banks.

    load      converts an adapter's factors to the banks' dtype and layout, on the host
    fetch     reads adapters again whose host copies were dropped for the budget
    acquire   gives the adapters of a batch their slots; missing ones are written into free slots,
              or over the least recently used adapter that is neither pinned nor in the batch
    hold      keeps a version that is replaced or unloaded, under a private name
    sums      adapters made on demand from loaded ones, and removed with any of these

An adapter whose rank is larger than a slot's takes consecutive slots, a window, known by its first
slot; its replaced weights take a separate place, of which there may be fewer than slots.

Banks are written in place, so captured addresses stay valid. Everything is checked before the first
write: a call that raises changes nothing. A slot belongs to no adapter while it is written.

One file: names, slots and host copies change together or not at all.
"""

from __future__ import annotations

import itertools
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar
from weakref import WeakSet

from lorafx.adapter_store.copy_streams import CopyStreams
from lorafx.adapter_store.fitting import fit_to_banks, places_of
from lorafx.adapter_store.names import (
    BASE,
    Mixture,
    adapters_among,
    check_name,
    members,
    with_experts,
)
from lorafx.adapter_store.routes import made_of
from lorafx.adapter_store.stored import (
    Adapter,
    Hold,
    HostCopy,
    HostMemory,
    Kept,
    Retired,
    StoredAdapter,
    measure,
)
from lorafx.adapter_store.windows import arrange, no_slots, too_many, window
from lorafx.errors import CapacityError, ConfigError, UnknownAdapterError, nearest, way_out_by
from lorafx.interrupts import free_after_fork, undisturbed
from lorafx.model.sites import Group

if TYPE_CHECKING:
    from lorafx.adapter_store.saved import AdapterSource, Origin

T = TypeVar("T")

#: Up to this part of the budget for host memory is freed ahead, since every loaded adapter takes
#: part in the search for what to drop.
_AHEAD = 1 / 64


class _Adapters(dict[str, StoredAdapter]):
    """Adapters by name. `derived` has the few names of sums and of retired versions among them, for
    which no step has to look through all."""

    def __init__(self) -> None:
        self.derived: dict[str, None] = {}

    def __setitem__(self, name: str, stored: StoredAdapter) -> None:
        super().__setitem__(name, stored)
        if isinstance(name, (Retired, Mixture)):
            self.derived[name] = None

    def __delitem__(self, name: str) -> None:
        super().__delitem__(name)
        self.derived.pop(name, None)


class AdapterStore:
    """Adapters by name, for banks of `groups` with `max_adapters` slots, within `max_host_bytes` of
    host memory. Safe to use from several threads.

    Attributes:
        hits: how often an adapter of a batch had a slot.
        loads: how often an adapter was written into a slot.
        evictions: how often an adapter lost its slot to another.
    """

    def __init__(
        self, groups: Sequence[Group], max_adapters: int, max_host_bytes: int | None = None
    ) -> None:
        self.max_adapters = max_adapters
        self.copy_streams = CopyStreams([t for g in groups for t in g.bank.tensors.values()])
        self.hits = self.loads = self.evictions = 0
        self._groups = tuple(groups)
        self._fit = partial(fit_to_banks, places=places_of(groups), groups=self._groups)
        self.host = HostMemory(self._fit, max_host_bytes)
        self._next_use = itertools.count(1).__next__
        self._lock = threading.RLock()
        self._adapters = _Adapters()
        self._slots: OrderedDict[str, int] = OrderedDict()  # least recently used first
        self._widest = max((g.bank.width(g.bank.max_rank) for g in groups), default=1)
        rooms = [len(g.bank.own) for g in groups if g.bank.own is not None]
        self._own_room = min(rooms, default=max_adapters)
        self._own_places: dict[int, int] = {}  # slot -> place of its last replaced weights
        self._pinned: set[str] = set()
        self._holds: WeakSet[Hold] = WeakSet()
        self._kept: WeakSet[Kept] = WeakSet()
        #: Within `run_emptied`: the store's contents before, and the slots written since.
        self._backup: Any = None
        self._written: set[int] = set()

    @property
    def names(self) -> tuple[str, ...]:
        with self._lock:
            return tuple(n for n in self._adapters if not isinstance(n, (Retired, Mixture)))

    @property
    def versions(self) -> dict[str, int]:
        with self._lock:
            return {name: self._adapters[name].version for name in self.names}

    @property
    def resident(self) -> dict[str, int]:
        """Adapters and sums -> slot, least recently used first."""
        with self._lock:
            return dict(self._slots)

    def places(self) -> dict[str, str]:
        """Where the numbers of each adapter are: in the "banks", in "host" memory and not there, or
        on "disk" only."""
        with self._lock:
            kept = {
                name: "disk" if self._adapters[name].host is None else "host" for name in self.names
            }
            return kept | {name: "banks" for name in self._slots if name in kept}

    @property
    def pinned(self) -> frozenset[str]:
        """Adapters that keep their slot until unpinned or unloaded; those of routes, too."""
        with self._lock:
            return frozenset(with_experts(self._pinned))

    def fits(self, names: frozenset[str]) -> bool:
        """Whether there are slots for all these adapters at once, with those that routes choose
        from, and room for replaced weights."""
        names = frozenset(with_experts(names))
        with self._lock:
            pinned = self._pinned_beside(names)
            if self._count_owning(names | pinned) > self._own_room:
                return False
            widths = {name: self._width(name) for name in names | pinned}
            fixed = {name: slot for name, slot in self._slots.items() if name in pinned}
            widest = max(widths.values(), default=0)
            if not fixed or widest < 2:
                return sum(widths.values()) - widest < self.max_adapters
            placed = arrange(widths, fixed, (), fixed, self.max_adapters, self._widest)
            return placed is not None

    def check_known(self, name: str) -> None:
        with self._lock:
            self._check_known([name] if name != BASE else [])

    def __contains__(self, name: object) -> bool:
        with self._lock:
            return isinstance(name, str) and all(n in self._adapters for n in members(name))

    def __getitem__(self, name: str) -> StoredAdapter:
        """The adapter or sum. Raises UnknownAdapterError, or as `sum_of`."""
        with self._lock:
            self._check_known([name])
            self._make_sums([name])
            return self._adapters[name]

    def load(self, adapter: Adapter, origin: Origin | None = None) -> None:
        """Add `adapter`, in place of one of the same name; `origin` is where it can be read again.
        Raises CapacityError, CheckpointError for values beyond the banks' dtype, ConfigError for an
        invalid name."""
        self.prepare_load(adapter, origin)()

    def prepare_load(self, adapter: Adapter, origin: Origin | None = None) -> Callable[[], None]:
        """Check a `load`. Returns a function that does it and does not fail. Raises as `load`."""
        check_name(adapter.name)
        stored = self._fit(adapter, origin=origin)
        with self._lock:
            slot = self._slots.get(stored.name) if stored.name in self._pinned else None
            if slot is not None and not self._has_room(slot, stored):
                what = "its own weights" if stored.owned else f"{stored.width} slots in a row"
                raise CapacityError(
                    f"{stored.name!r} is pinned, and there is no room for {what} in its place; "
                    "unpin it first"
                )
        stored.memory = self.host

        def add() -> None:
            with self._lock:
                undisturbed(lambda: self._add(stored))
                self._drop_over_budget()

        return add

    def fetch(self, names: Iterable[str | None], *, resident: bool = False) -> Kept:
        """Read those of these adapters that were dropped, without the lock; adapters with a slot
        only if `resident`. All stay in host memory while the result lives. Raises
        UnknownAdapterError, or CheckpointError for a changed file."""
        given = [name for name in names if name is not None and name != BASE]
        with self._lock:
            self._check_known(given)
            adapters = adapters_among(given)
            kept = Kept(
                [
                    self._adapters[member]
                    for name in adapters
                    if resident or name not in self._slots
                    for member in ([name] if name in self._adapters else members(name))
                ]
            )
            self._kept.add(kept)
        for stored in kept.adapters:
            stored.used = self._next_use()
            if stored.host is None:
                stored.host = self.host.read(stored)
        with self._lock:
            self._drop_over_budget()
        return kept

    def read_with(self, reader: Callable[[AdapterSource, str], Adapter]) -> None:
        """Set the function that reads dropped adapters; none are dropped without it."""
        with self._lock:
            self.host.reader = reader
            self._drop_over_budget()

    def unload(self, name: str) -> None:
        with self._lock:
            self._check_known([name])
            undisturbed(lambda: self._unload(name))

    def pin(self, name: str) -> int:
        """Keep an adapter in a slot until it is unpinned. Returns the slot."""
        with self._lock:
            self._check_known([name])
            slot, *_ = self.acquire([*with_experts([name])])
            self._pinned.add(name)
            return slot

    def unpin(self, name: str) -> None:
        with self._lock:
            self._check_known([name])
            self._pinned.discard(name)

    def hold(self, name: str) -> Hold:
        """Keep this version of an adapter while the result lives. Raises as `fetch`."""
        with self.fetch([name], resident=True), self._lock:
            hold = Hold(name, self[name])
            self._holds.add(hold)
            return hold

    def run_emptied(self, action: Callable[[], T]) -> T:
        """Run `action` with an empty store, then restore adapters and slots. Other threads wait."""
        with self._lock:
            before = self._adapters, self._slots, self._pinned
            empty: OrderedDict[str, int] = OrderedDict()
            pinned: set[str] = set()
            try:
                self._backup = before
                self._adapters, self._slots, self._pinned = _Adapters(), empty, pinned
                return action()
            finally:
                try:
                    undisturbed(self._restore_contents)
                except BaseException:  # a signal before it began
                    undisturbed(self._restore_contents)
                    raise

    def acquire(
        self,
        names: Sequence[str | None],
        busy: frozenset[int] = frozenset(),
        *,
        in_waves: bool = False,
    ) -> list[int]:
        """The slot of each row's adapter, -1 for None and "__base__". Slots that are `busy` in
        enclosing calls keep their contents. Raises UnknownAdapterError, ConfigError for an
        impossible sum, CapacityError for too few free slots or ranks: `in_waves`, whether the rows
        may be served in turn, is for its message."""
        with self._lock:
            adapters = adapters_among(names)
            self.hits += self._give_slots(adapters, busy, in_waves=in_waves)
            slots = [-1 if name is None or name == BASE else self._slots[name] for name in names]
            self.copy_streams.use({s for n in adapters for s in self._window(n, self._slots[n])})
            return slots

    def refresh_magnitudes(self) -> None:
        """Recompute what depends on the base's weights: DoRA norms, bias differences, and changed
        weights. Raises ConfigError for an unknown format."""
        with self._lock:
            self.copy_streams.use(range(self.max_adapters))
            base_dependent = {
                name: stored.numbers
                for name, stored in self._adapters.items()
                if stored.depends_on_base
            }
            for g, group in enumerate(self._groups):
                measure(group, [f for c in base_dependent.values() for f in c.factors.get(g, ())])
            for name in base_dependent.keys() & self._slots.keys():
                for g, factors in base_dependent[name].factors.items():
                    self._groups[g].bank.write_by_column(self._slots[name], factors)
            self.write_changed()

    def write_changed(self) -> None:
        """Make the changed weights in slots again, of the base's current ones."""
        with self._lock:
            self.copy_streams.use(range(self.max_adapters))
            for name, slot in self._slots.items():
                copy = self._adapters[name].host
                if copy is None:  # dropped, which those that are made of the base's never are
                    continue
                for g, changed in copy.changed.items():
                    if changed.structure is None:
                        weight = copy.in_slot(g, self._groups[g])
                        self._groups[g].bank.write_rows(slot, weight, self._own_places[slot])

    def nbytes(self) -> dict[str, int]:
        """Bytes of the banks, of adapters on the host ("host"), and of their files ("disk")."""
        with self._lock:
            origins = (stored.origin for stored in self._adapters.values())
            files = (origin.files.values() for origin in origins if origin is not None)
            return {
                "banks": sum(group.bank.nbytes for group in self._groups),
                "host": self._host_bytes(),
                "disk": sum(size for stamps in files for _, size, _ in stamps),
            }

    def _host_bytes(self) -> int:
        copies = [stored.host for stored in self._adapters.values() if stored.host is not None]
        return sum({id(copy): copy.nbytes for copy in copies}.values())

    def after_fork(self) -> None:
        lock = free_after_fork(self._lock)
        if lock is not self._lock:
            self._lock = lock
            self._restore_contents()

    # --- adapters ---

    def _check_known(self, names: Sequence[str]) -> None:
        absent = [n for n in names if not isinstance(n, str) or n not in self._adapters]
        for name in absent:
            if not isinstance(name, str):
                raise ConfigError(
                    f"{name!r:.80} is no name of an adapter; weights by name are for calls, blocks "
                    "and set_adapter()"
                )
        parts = dict.fromkeys(member for name in absent for member in members(name))
        unknown = [name for name in parts if name not in self._adapters]
        if unknown:
            known = self.names
            near = "; ".join(f"{name!r}{nearest(str(name), known)}" for name in unknown)
            loaded = ", ".join(known) or "none"
            raise UnknownAdapterError(f"no adapter named {near}; loaded: {loaded}")

    def _add(self, stored: StoredAdapter) -> None:
        self._remove_sums_of(stored.name)
        self._retire(stored.name)
        slot = self._slots.pop(stored.name, None)
        if slot is not None and self._has_room(slot, stored):  # else the next call gives it another
            self._write(slot, stored, stored.numbers)
            self._slots[stored.name] = slot
        self._adapters[stored.name] = stored
        stored.used, self.host.grown = self._next_use(), True

    def _drop_over_budget(self) -> None:
        """Drop the host copies of the least recently fetched adapters, below the budget."""
        host = self.host
        if host.budget is None or host.reader is None or not host.grown or self._backup is not None:
            return
        in_use = {hold.stored for hold in list(self._holds)}
        in_use = in_use.union(*(kept.adapters for kept in list(self._kept)))
        for idle in self._sum_names():
            if idle not in self._slots and self._adapters[idle] not in in_use:
                undisturbed(partial(self._unload, idle))
        excess = self._host_bytes() - host.budget
        ahead = host.budget * _AHEAD if excess > 0 else 0
        for name, stored in sorted(self._adapters.items(), key=lambda item: item[1].used):
            stays = stored in in_use or name in self._pinned or isinstance(name, Mixture)
            if stored.host is None or not stored.can_be_dropped or stays:
                continue
            if excess <= 0 and excess - stored.host.nbytes < -ahead:
                break
            excess -= stored.host.nbytes
            stored.host = None
            host.evictions += 1
        host.grown = excess > 0

    def _unload(self, name: str) -> None:
        self._remove_sums_of(name)
        self._retire(name)
        self._pinned.discard(name)
        self._forget(name)

    def _forget(self, name: str) -> None:
        if name in self._adapters:
            del self._adapters[name]
        self._slots.pop(name, None)

    def _retire(self, name: str) -> None:
        """Give a version that requests hold a private name, under which it keeps its slot."""
        stored = self._adapters.get(name)
        holds = [hold for hold in list(self._holds) if hold.stored is stored]
        if stored is None or not holds:
            return
        private = Retired(stored)
        del self._adapters[name]
        self._adapters[private] = stored
        if name in self._slots:
            self._slots[private] = self._slots.pop(name)
        for hold in holds:
            hold.name = private

    def _forget_released(self) -> None:
        retired = [name for name in self._adapters.derived if isinstance(name, Retired)]
        if retired:
            in_use = {hold.name for hold in list(self._holds)}
            for name in retired:
                if name not in in_use:
                    self._forget(name)

    def _sum_names(self) -> list[Mixture]:
        return [name for name in self._adapters.derived if isinstance(name, Mixture)]

    def _make_sums(self, names: Sequence[str]) -> None:
        """Make the sums among `names`, and remove the oldest sums that have no slot."""
        missing = [n for n in names if isinstance(n, Mixture) and n not in self._adapters]
        if not missing:
            return
        idle = [name for name in self._sum_names() if name not in self._slots and name not in names]
        for name in idle[: max(0, len(idle) - self.max_adapters)]:
            undisturbed(partial(self._unload, name))
        for name in missing:
            self._adapters[name] = made_of(name, self._adapters, self._groups)
            self.host.grown = True

    def _remove_sums_of(self, name: str) -> None:
        for sum_name in self._sum_names():
            if name in members(sum_name):
                self._unload(sum_name)

    # --- slots ---

    def _pinned_beside(self, names: Iterable[str]) -> set[str]:
        """Pinned adapters, but not those of whose versions `names` has only a retired one."""
        replaced = {name.replaced for name in names if isinstance(name, Retired)}
        return {*with_experts(self._pinned)} - replaced.difference(names)

    def _give_slots(self, adapters: Sequence[str], busy: frozenset[int], *, in_waves: bool) -> int:
        """Give `adapters` slots, sparing `busy` ones. Returns how many already had one."""
        self._forget_released()
        self._check_known(adapters)
        if len(adapters) > self.max_adapters:
            raise too_many(dict.fromkeys(adapters, 1), self.max_adapters, in_waves=in_waves)
        self._make_sums(adapters)
        widths = {name: self._adapters[name].width for name in adapters}
        if sum(widths.values()) - max(widths.values(), default=0) >= self.max_adapters:
            raise too_many(widths, self.max_adapters, in_waves=in_waves)
        missing = [name for name in adapters if name not in self._slots]
        if missing:
            self.copy_streams.refuse_captured(missing)
            self._make_resident(missing, adapters, busy)
        for name in adapters:
            self._slots.move_to_end(name)
        return len(adapters) - len(missing)

    def _make_resident(
        self, missing: Sequence[str], adapters: Sequence[str], busy: frozenset[int]
    ) -> None:
        pinned = self._pinned_beside(adapters)
        fixed = {name for name, slot in self._slots.items() if name in pinned or slot in busy}
        evictable = [name for name in self._slots if name not in fixed.union(adapters)]
        evicted = self._owners_to_evict(missing, evictable)
        slots = {name: slot for name, slot in self._slots.items() if name not in evicted}
        widths = {name: self._adapters[name].width for name in [*slots, *missing]}
        evictable = [name for name in evictable if name not in evicted]
        placed = arrange(widths, slots, evictable, fixed, self.max_adapters, self._widest)
        if placed is None:
            missing_widths = {name: widths[name] for name in missing}
            raise no_slots(missing_widths, fixed.difference(adapters) or fixed, self.max_adapters)
        copies = {name: self._adapters[name].numbers for name in placed}  # a file may be gone
        written = {slot for name, first in placed.items() for slot in self._window(name, first)}
        evicted += [n for n in evictable if not written.isdisjoint(self._window(n, slots[n]))]
        for name in [*evicted, *(name for name in placed if name in slots)]:
            del self._slots[name]
        self.evictions += len(evicted)
        for name, slot in placed.items():
            self.loads += 1
            # Assigned after the write: if the device fails, the slot belongs to no adapter.
            stored = self._adapters[name]
            self._write(slot, stored, copies[name])
            self._slots[name] = slot
            self.host.hits += not stored.reread
            stored.reread = False

    def _owners_to_evict(self, missing: Sequence[str], evictable: Sequence[str]) -> list[str]:
        """The first of `evictable` that make room for the replaced weights of `missing`."""
        excess = self._count_owning([*missing, *self._slots]) - self._own_room
        owners = [name for name in evictable if self._adapters[name].owned]
        if excess > len(owners):
            names = [name for name in missing if self._adapters[name].owned]
            needed = way_out_by("max_own_weights", self._own_room + excess - len(owners))
            raise CapacityError(
                f"no room for the own weights of {', '.join(names)}: the banks hold those of at "
                f"most {self._own_room} adapters at a time; {needed}, unpin adapters, or split the "
                "batch"
            ).naming(needed)
        return owners[: max(0, excess)]

    def _count_owning(self, names: Iterable[str]) -> int:
        """How many of these replace weights; a sum does only as a single adapter at weight 1."""
        adapters = (
            [member for member, weight in name.weights if weight]
            if isinstance(name, Mixture)
            else [name]
            for name in names
        )
        return sum(any(self._adapters[name].owned for name in names) for names in adapters)

    def _width(self, name: str) -> int:
        """How many slots an adapter takes: for a sum that is not made yet, at most this many."""
        if name in self._adapters:
            return self._adapters[name].width
        return sum(self._adapters[member].width for member in members(name))

    def _window(self, name: str, slot: int) -> range:
        return window(slot, self._adapters[name].width, self.max_adapters)

    def _has_room(self, slot: int, stored: StoredAdapter) -> bool:
        """Whether this version of an adapter fits into `slot` without touching other adapters."""
        other_slots = {name: first for name, first in self._slots.items() if name != stored.name}
        taken = {s for name, first in other_slots.items() for s in self._window(name, first)}
        owners = self._count_owning(other_slots) + bool(stored.owned)
        free = taken.isdisjoint(window(slot, stored.width, self.max_adapters))
        return free and owners <= self._own_room

    def _write(self, slot: int, stored: StoredAdapter, copy: HostCopy) -> None:
        """Write an adapter that `_slots` does not list meanwhile."""
        slots = touched = window(slot, stored.width, self.max_adapters)
        place = 0
        if stored.owned:
            owners = [first for name, first in self._slots.items() if self._adapters[name].owned]
            taken = {self._own_places[first] for first in owners}
            place = self._own_places[slot] = min(set(range(self._own_room)) - taken)
            touched = range(self.max_adapters)  # the place may have belonged to any slot
        if self._backup is not None:
            self._written.update(touched)

        def write() -> list[object]:
            sources: list[object] = [copy]
            for g, group in enumerate(self._groups):
                factors, weight = copy.factors.get(g, ()), copy.in_slot(g, group)
                if g not in copy.tables:
                    copy.tables[g] = group.bank.tables(factors)
                sources += group.bank.write(slot, factors, copy.tables[g], weight, place)
            return sources

        self.copy_streams.copy(stored.name, slots, write, touched)

    def _restore_contents(self) -> None:
        if self._backup is None:
            return
        self._adapters, slots, self._pinned = self._backup
        touched = {
            name
            for name, slot in slots.items()
            if not self._written.isdisjoint(self._window(name, slot))
        }
        self._slots = OrderedDict((n, s) for n, s in slots.items() if n not in touched)
        for name in touched:
            stored = self._adapters[name]
            if stored.host is None:
                del slots[name]  # reading its file would keep other threads waiting
            else:
                self._write(slots[name], stored, stored.host)
                self._slots[name] = slots[name]
        self._slots, self._backup = slots, None
        self._written.clear()


@dataclass(frozen=True)
class AdapterInfo:
    """A loaded adapter: its largest rank, the paths of the modules that it changes, its slot (None
    without one), whether it is pinned, and its current bytes in host memory."""

    name: str
    source: str
    rank: int
    sites: tuple[str, ...]
    version: int
    slot: int | None
    pinned: bool
    nbytes: int


def info(store: AdapterStore, name: str) -> AdapterInfo:
    item = store[name]
    slot, pinned = store.resident.get(name), name in store.pinned
    nbytes = 0 if item.host is None else item.host.nbytes
    return AdapterInfo(name, item.source, item.rank, item.sites, item.version, slot, pinned, nbytes)
