"""The store: adapters in host memory by name, and the slots of the banks.

    load      factors of a file -> the banks' dtype and layout, on the host
    fetch     host copies dropped for the budget -> read again
    acquire   the names of a batch's rows -> slots; missing adapters are written into free slots,
              or over the least recently used adapter that is neither pinned nor in the batch
    hold      a replaced or unloaded version lives on under a private name
    sums      adapters made of loaded ones on demand, and forgotten with any of these

Banks are written in place, so captured addresses stay valid. Everything is checked before the first
write; a call that raises has changed nothing. A slot belongs to no adapter while it is written.
"""

from __future__ import annotations

import itertools
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar
from weakref import WeakSet

from lorafx.adapter_store.copy_streams import CopyStreams
from lorafx.adapter_store.mixing import mixed
from lorafx.adapter_store.names import BASE, Mixture, adapters_among, check_name, members
from lorafx.adapter_store.stored import (
    Adapter,
    Hold,
    HostCopy,
    HostTier,
    Kept,
    Retired,
    StoredAdapter,
    fitted,
    measure,
    places_of,
)
from lorafx.errors import CapacityError, ConfigError, UnknownAdapterError, nearest
from lorafx.interrupts import free_after_fork, undisturbed

if TYPE_CHECKING:
    from lorafx.adapter_store.saved import AdapterSource, Origin
    from lorafx.model.sites import Group

T = TypeVar("T")


class AdapterStore:
    """Adapters by name over the banks of `groups`, of `max_adapters` slots, with `max_host_bytes`
    of host memory. Safe to use from several threads.

    Attributes:
        hits: adapters of batches that had a slot.
        loads: adapters that were written into a slot.
        evictions: adapters that lost their slot to another.
    """

    def __init__(
        self, groups: Sequence[Group], max_adapters: int, max_host_bytes: int | None = None
    ) -> None:
        self.max_adapters = max_adapters
        self.copy_streams = CopyStreams([t for g in groups for t in g.bank.tensors.values()])
        self.hits = self.loads = self.evictions = 0
        self._groups = tuple(groups)
        self._fitted = partial(fitted, places=places_of(groups), groups=self._groups)
        self.host = HostTier(self._fitted, max_host_bytes)
        self._next_use = itertools.count(1).__next__
        self._lock = threading.RLock()
        self._adapters: dict[str, StoredAdapter] = {}
        self._slots: OrderedDict[str, int] = OrderedDict()  # least recently used first
        self._pinned: set[str] = set()
        self._holds: WeakSet[Hold] = WeakSet()
        self._kept: WeakSet[Kept] = WeakSet()
        #: Inside `set_aside`: what the store had, and the slots written since.
        self._aside: Any = None
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

    @property
    def pinned(self) -> frozenset[str]:
        """Adapters that keep their slot until unpinned or unloaded."""
        with self._lock:
            return frozenset(self._pinned)

    def fits(self, names: frozenset[str]) -> bool:
        """Whether these adapters find slots together."""
        with self._lock:
            return len(names | self._pinned_beside(names)) <= self.max_adapters

    def check_known(self, name: str) -> None:
        with self._lock:
            self._check_known([name] if name != BASE else [])

    def __contains__(self, name: object) -> bool:
        with self._lock:
            return isinstance(name, str) and all(n in self._adapters for n in members(name))

    def __getitem__(self, name: str) -> StoredAdapter:
        """The adapter or sum; raises UnknownAdapterError, or as
        `lorafx.adapter_store.mixing.mixed`."""
        with self._lock:
            self._check_known([name])
            self._mix([name])
            return self._adapters[name]

    def load(self, adapter: Adapter, origin: Origin | None = None) -> None:
        """Keep `adapter` in host memory, replacing its namesake in place; it can be read again from
        `origin`. Raises CapacityError, CheckpointError for values beyond the banks' dtype,
        ConfigError for an invalid name."""
        self.loading(adapter, origin)()

    def loading(self, adapter: Adapter, origin: Origin | None = None) -> Callable[[], None]:
        """Checks a `load`, and returns its unfailing second half. Raises as `load`."""
        check_name(adapter.name)
        stored = self._fitted(adapter, origin=origin)
        stored.tier = self.host

        def keep() -> None:
            with self._lock:
                undisturbed(lambda: self._keep(stored))
                self._trim()

        return keep

    def fetch(self, names: Iterable[str | None], *, resident: bool = False) -> Kept:
        """Read the dropped ones of these adapters again, without the lock; those with a slot only
        if `resident`. All stay in host memory while the result lives. Raises UnknownAdapterError,
        or CheckpointError for a changed file."""
        wanted = adapters_among(names)
        with self._lock:
            self._check_known(wanted)
            kept = Kept(
                [
                    self._adapters[member]
                    for name in wanted
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
            self._trim()
        return kept

    def read_with(self, reader: Callable[[AdapterSource, str], Adapter]) -> None:
        """Set what reads dropped adapters, by source and name; without it none is dropped."""
        with self._lock:
            self.host.reader = reader
            self._trim()

    def unload(self, name: str) -> None:
        with self._lock:
            self._check_known([name])
            undisturbed(lambda: self._unload(name))

    def pin(self, name: str) -> int:
        """Give an adapter a slot until it is unpinned; returns the slot."""
        with self._lock:
            self._check_known([name])
            (slot,) = self.acquire([name])
            self._pinned.add(name)
            return slot

    def unpin(self, name: str) -> None:
        with self._lock:
            self._check_known([name])
            self._pinned.discard(name)

    def hold(self, name: str) -> Hold:
        """Keep this version of an adapter while the result lives. Raises as `fetch`."""
        kept = self.fetch([name], resident=True)  # noqa: F841 - without the lock
        with self._lock:
            hold = Hold(name, self[name])
            self._holds.add(hold)
            return hold

    def set_aside(self, action: Callable[[], T]) -> T:
        """Run `action` with an empty store, then restore it, slots included. Other threads wait."""
        with self._lock:
            before = self._adapters, self._slots, self._pinned
            empty: OrderedDict[str, int] = OrderedDict()
            pinned: set[str] = set()
            try:
                self._aside = before
                self._adapters, self._slots, self._pinned = {}, empty, pinned
                return action()
            finally:
                try:
                    undisturbed(self._put_back)
                except BaseException:  # a signal before it began
                    undisturbed(self._put_back)
                    raise

    def acquire(self, names: Sequence[str | None], held: frozenset[int] = frozenset()) -> list[int]:
        """The slot of each row's adapter, -1 for None and "__base__"; slots `held` by enclosing
        calls keep their contents. Raises UnknownAdapterError, CapacityError for too few free slots
        or ranks, ConfigError for an impossible sum."""
        with self._lock:
            self.hits += self._give_slots(adapters_among(names), held)
            slots = [-1 if name is None or name == BASE else self._slots[name] for name in names]
            self.copy_streams.use({slot for slot in slots if slot >= 0})
            return slots

    def refresh_magnitudes(self) -> None:
        """Recompute DoRA norms and bias differences in place. ConfigError for an unknown format."""
        with self._lock:
            self.copy_streams.use(range(self.max_adapters))
            following = {
                name: stored.numbers.factors
                for name, stored in self._adapters.items()
                if stored.follows_base
            }
            for g, group in enumerate(self._groups):
                measure(group, [f for factors in following.values() for f in factors.get(g, ())])
            for name in following.keys() & self._slots.keys():
                for g, factors in following[name].items():
                    self._groups[g].bank.write_by_column(self._slots[name], factors)

    def nbytes(self) -> dict[str, int]:
        """Bytes of the banks, of adapters on the host ("host"), and of files that can be read again
        ("disk")."""
        with self._lock:
            every = self._adapters.values()
            files = (s.origin.files.values() for s in every if s.origin is not None)
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
            self._put_back()

    # --- adapters ---

    def _check_known(self, names: Sequence[str]) -> None:
        lacking = [n for n in names if not isinstance(n, str) or n not in self._adapters]
        for name in lacking:
            if isinstance(name, Mapping):
                raise ConfigError(
                    f"{name!r} is no name of an adapter; weights by name are for calls, blocks and "
                    "set_adapter()"
                )
        wanted = dict.fromkeys(member for name in lacking for member in members(name))
        unknown = [name for name in wanted if name not in self._adapters]
        if unknown:
            known = self.names
            near = "; ".join(f"{name!r}{nearest(str(name), known)}" for name in unknown)
            loaded = ", ".join(known) or "none"
            raise UnknownAdapterError(f"no adapter named {near}; loaded: {loaded}")

    def _keep(self, stored: StoredAdapter) -> None:
        self._unmix(stored.name)
        self._retire(stored.name)
        slot = self._slots.pop(stored.name, None)
        if slot is not None:
            self._write(slot, stored.name, stored.numbers)
            self._slots[stored.name] = slot
        self._adapters[stored.name] = stored
        stored.used, self.host.grown = self._next_use(), True

    def _trim(self) -> None:
        """Drop adapters that were not looked for lately, down to the budget."""
        host = self.host
        if host.budget is None or host.reader is None or not host.grown or self._aside is not None:
            return
        held = {hold.stored for hold in list(self._holds)}
        held = held.union(*(kept.adapters for kept in list(self._kept)))
        for made in self._sums():
            if made not in self._slots and self._adapters[made] not in held:
                undisturbed(partial(self._unload, made))
        over = self._host_bytes() - host.budget
        for name, stored in sorted(self._adapters.items(), key=lambda item: item[1].used):
            if over <= 0:
                break
            stays = stored in held or name in self._pinned or isinstance(name, Mixture)
            if stored.host is not None and stored.can_be_dropped and not stays:
                over -= stored.host.nbytes
                stored.host = None
                host.evictions += 1
        host.grown = over > 0

    def _unload(self, name: str) -> None:
        self._unmix(name)
        self._retire(name)
        self._pinned.discard(name)
        self._forget(name)

    def _forget(self, name: str) -> None:
        self._adapters.pop(name, None)
        self._slots.pop(name, None)

    def _retire(self, name: str) -> None:
        """Rename a version that requests hold, with its slot."""
        stored = self._adapters.get(name)
        holds = [hold for hold in list(self._holds) if hold.stored is stored]
        if stored is None or not holds:
            return
        kept = Retired(stored)
        self._adapters[kept] = self._adapters.pop(name)
        if name in self._slots:
            self._slots[kept] = self._slots.pop(name)
        for hold in holds:
            hold.name = kept

    def _let_go(self) -> None:
        """Forget retired versions that no request holds any more."""
        retired = [name for name in self._adapters if isinstance(name, Retired)]
        if retired:
            held = {hold.name for hold in list(self._holds)}
            for name in retired:
                if name not in held:
                    self._forget(name)

    def _sums(self) -> list[Mixture]:
        return [name for name in self._adapters if isinstance(name, Mixture)]

    def _mix(self, names: Sequence[str]) -> None:
        """Make the sums among `names`; of earlier ones without a slot, keep the last few."""
        missing = [n for n in names if isinstance(n, Mixture) and n not in self._adapters]
        if not missing:
            return
        idle = [name for name in self._sums() if name not in self._slots and name not in names]
        for name in idle[: max(0, len(idle) - self.max_adapters)]:
            undisturbed(partial(self._unload, name))
        for name in missing:
            self._adapters[name] = mixed(name, self._adapters, self._groups)
            self.host.grown = True

    def _unmix(self, name: str) -> None:
        for made in self._sums():
            if name in members(made):
                self._unload(made)

    # --- slots ---

    def _pinned_beside(self, names: Iterable[str]) -> set[str]:
        """Pinned adapters beside `names`; a held version shares the slot of its pinned name."""
        replaced = {name.replaced for name in names if isinstance(name, Retired)}
        return self._pinned - replaced.difference(names)

    def _give_slots(self, wanted: Sequence[str], held: frozenset[int]) -> int:
        """Give slots to `wanted`, sparing `held` ones; returns how many had one."""
        self._let_go()
        self._check_known(wanted)
        if len(wanted) > self.max_adapters:
            raise _too_many(wanted, self.max_adapters)
        self._mix(wanted)
        missing = [name for name in wanted if name not in self._slots]
        if missing:
            self.copy_streams.refuse_captured(missing)
            self._make_resident(missing, wanted, held)
        for name in wanted:
            self._slots.move_to_end(name)
        return len(wanted) - len(missing)

    def _make_resident(
        self, missing: Sequence[str], wanted: Sequence[str], held: frozenset[int]
    ) -> None:
        copies = [self._adapters[name].numbers for name in missing]
        pinned = self._pinned_beside(wanted)
        kept = {name for name, slot in self._slots.items() if name in pinned or slot in held}
        evictable = [name for name in self._slots if name not in kept.union(wanted)]
        free = sorted(set(range(self.max_adapters)).difference(self._slots.values()))
        lacking = max(0, len(missing) - len(free))
        if lacking > len(evictable):
            raise _no_slots(missing, kept.difference(wanted) or kept, self.max_adapters)
        evicted = [self._slots.pop(name) for name in evictable[:lacking]]
        self.evictions += len(evicted)
        for name, copy, slot in zip(missing, copies, [*free, *evicted], strict=False):
            self.loads += 1
            # Assigned afterwards: after a failure of the device the slot belongs to no adapter.
            stored = self._adapters[name]
            self._write(slot, stored.name, copy)
            self._slots[name] = slot
            self.host.hits += not stored.reread
            stored.reread = False

    def _write(self, slot: int, name: str, copy: HostCopy) -> None:
        if self._aside is not None:
            self._written.add(slot)

        def write() -> list[object]:
            sources: list[object] = [copy]
            for g, group in enumerate(self._groups):
                sources += group.bank.write(slot, copy.factors.get(g, ()), copy.own.get(g))
            return sources

        self.copy_streams.copy(name, slot, write)

    def _put_back(self) -> None:
        if self._aside is None:
            return
        self._adapters, slots, self._pinned = self._aside
        self._slots = OrderedDict((n, s) for n, s in slots.items() if s not in self._written)
        for name, slot in list(slots.items()):
            if slot in self._written:
                copy = self._adapters[name].host
                if copy is None:
                    del slots[name]  # a file is not read here: other threads wait
                else:
                    self._write(slot, name, copy)
        self._slots, self._aside = slots, None
        self._written.clear()


def _too_many(wanted: Sequence[str], slots: int) -> CapacityError:
    return CapacityError(
        f"the batch has {len(wanted)} distinct adapters ({', '.join(wanted)}), but "
        f"there are only {slots} slots; split the batch, or compile "
        f'with LoraConfig(max_adapters={len(wanted)}) or Options(overflow="waves"), which '
        "serves requests in turn where each finds slots beside pinned adapters"
    )


def _no_slots(missing: Sequence[str], kept: Iterable[str], slots: int) -> CapacityError:
    return CapacityError(
        f"no slots for {', '.join(missing)}: {slots} slots, of which "
        f"those of {', '.join(sorted(kept))} are pinned, or used by the call around this one; "
        "unpin_adapter() some, split the batch, or "
        "compile with a larger LoraConfig(max_adapters=...)"
    )


@dataclass(frozen=True)
class AdapterInfo:
    """A loaded adapter: its largest rank, the paths of the modules that it changes, its slot (None
    where it has none), whether it is pinned, and its current host bytes."""

    name: str
    source: str
    rank: int
    sites: tuple[str, ...]
    version: int
    slot: int | None
    pinned: bool
    nbytes: int


def info(store: AdapterStore, name: str) -> AdapterInfo:
    """The `AdapterInfo` of a loaded adapter."""
    s = store[name]
    slot, pinned = store.resident.get(name), name in store.pinned
    nbytes = 0 if s.host is None else s.host.nbytes
    return AdapterInfo(name, s.source, s.rank, s.sites, s.version, slot, pinned, nbytes)
