"""The store: adapters in host memory by name, and the slots of the banks.

    load      checkpoint factors -> host copies in the banks' dtype and layout
    fetch     host copies dropped for the budget -> read again
    acquire   the names of a batch's rows -> slots; missing adapters are written into free slots,
              or over the least recently used adapter that is neither pinned nor in the batch
    hold      a replaced or unloaded version lives on under a private name
    sums      adapters made of loaded ones on demand, and forgotten with any of these

Banks are written in place, so captured addresses stay valid. Everything is checked before the first
write; a call that raises has changed nothing. A slot belongs to no adapter while it is written.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, TypeVar
from weakref import WeakSet

from lorafx.adapter_store.fitting import fitted, measure, places_of
from lorafx.adapter_store.mixing import mixed
from lorafx.adapter_store.names import BASE, Mixture, adapters_among, check_name, members
from lorafx.adapter_store.saved import AdapterSource, Origin
from lorafx.adapter_store.slots import Slots, too_many
from lorafx.adapter_store.stored import Adapter, Hold, HostCopy, HostTier, Retired, StoredAdapter
from lorafx.errors import CapacityError, ConfigError, UnknownAdapterError, nearest
from lorafx.interrupts import free_after_fork, undisturbed

if TYPE_CHECKING:
    from lorafx.model.sites import Group

T = TypeVar("T")


class AdapterStore(Slots):
    """Adapters by name over the banks of `groups`, with room for `own_weights` adapters' replaced
    weights (default: all slots) and `max_host_bytes` of host copies. Safe to use from several
    threads."""

    def __init__(
        self,
        groups: Sequence[Group],
        max_adapters: int,
        own_weights: int | None = None,
        max_host_bytes: int | None = None,
    ) -> None:
        self._fitted = partial(fitted, places=places_of(groups), groups=tuple(groups))
        rooms = max_adapters if own_weights is None else own_weights
        super().__init__(groups, max_adapters, rooms, HostTier(self._fitted, max_host_bytes))
        self._lock = threading.RLock()
        # Versions that requests hold though replaced or unloaded, and their names.
        self._held: WeakSet[Hold] = WeakSet()
        self._retired: dict[int, Retired] = {}

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

    def fits(self, names: frozenset[str], *, own: bool = False) -> bool:
        """Whether these adapters find slots together; with `own`, room for replaced weights."""
        with self._lock:
            return self._together(names, own=own)

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
        """Keep `adapter` in host memory, replacing its namesake in place; it can be reread from
        `origin`. Raises CapacityError, CheckpointError for values beyond the banks' dtype,
        ConfigError for an invalid name."""
        self.loading(adapter, origin)()

    def loading(self, adapter: Adapter, origin: Origin | None = None) -> Callable[[], None]:
        """Checks a `load`, and returns its unfailing second half. Raises as `load`."""
        check_name(adapter.name)
        stored = self._fitted(adapter, origin=origin)
        with self._lock:
            slot = self._slots.get(stored.name) if stored.name in self._pinned else None
            if slot is not None and not self._fits(slot, stored):
                raise _outgrown(stored)

        def keep() -> None:
            with self._lock:
                undisturbed(lambda: self._keep(stored))
                self._trim()

        return keep

    def fetch(self, names: Iterable[str | None], *, resident: bool = False) -> list[HostCopy]:
        """These adapters' host copies (of `resident` only those with a slot), kept as long as the
        result lives. Dropped copies are read again, without the lock. Raises UnknownAdapterError,
        or CheckpointError for a changed file."""
        found: list[HostCopy] = []
        if self.host.budget is None:
            return found
        for name in adapters_among(names):
            with self._lock:
                self._check_known([name])
                needed = members(name) if resident or name not in self._slots else ()
                wanted = [self._adapters[member] for member in needed]
                copies = [self.host.get(stored) for stored in wanted]
            for stored, copy in zip(wanted, copies, strict=True):
                found.append(self.host.read(stored) if copy is None else copy)
        with self._lock:
            self._trim()
        return found

    @contextmanager
    def fetched(self, names: Iterable[str | None]) -> Iterator[None]:
        """A block during which these host copies stay in memory. Raises as `fetch`."""
        copies = self.fetch(names, resident=True)
        yield
        del copies

    def read_with(self, reader: Callable[[AdapterSource, str], Adapter]) -> None:
        """Set the reader of adapters, by source and name; without it no copy is dropped."""
        with self._lock:
            self.host.reader = reader
            self._trim()

    def numbers(self, name: str) -> HostCopy:
        """The host copy of an adapter or a sum. Raises as `__getitem__` and `fetch`."""
        with self._lock:
            return self.host.numbers(self[name])

    def unload(self, name: str) -> None:
        with self._lock:
            self._check_known([name])
            undisturbed(lambda: self._unload(name))

    def pin(self, name: str) -> int:
        """Give an adapter a slot until it is unpinned; returns the slot."""
        with self.fetched([name]), self._lock:
            self._check_known([name])
            (slot,) = self.acquire([name])
            self._pinned.add(name)
            self.host.numbers(self[name])  # it stays loaded
            return slot

    def unpin(self, name: str) -> None:
        with self._lock:
            self._check_known([name])
            self._pinned.discard(name)

    def hold(self, name: str) -> Hold:
        """Keep this version of an adapter while the result lives. Raises as `fetch`."""
        with self.fetched([name]), self._lock:
            stored = self[name]
            hold = Hold(name, stored, self.host.numbers(stored))
            self._held.add(hold)
            return hold

    def held_name(self, hold: Hold) -> str:
        with self._lock:
            loaded = self._adapters.get(hold.name) is hold.stored
            return hold.name if loaded else self._retired[hold.stored.version]

    def held_names(self, holds: Iterable[Hold]) -> list[str]:
        with self._lock:
            return [self.held_name(hold) for hold in holds]

    def set_aside(self, action: Callable[[], T]) -> T:
        """Run `action` with an empty store, then restore it, slots included. Other threads wait."""
        with self._lock:
            before = self._adapters, self._slots, self._pinned
            empty: OrderedDict[str, int] = OrderedDict()
            pinned: set[str] = set()
            try:
                self._aside, self._last = before, None
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
        key = tuple(names)
        with self._lock:
            if self._last is not None and self._last[0] == key:
                self.copy_streams.use(self._last[2])
                return list(self._last[1])  # decoding repeats the same rows
            wanted = adapters_among(key)
            self.hits += self._give_slots(wanted, held)
            slots = [-1 if n is None or n == BASE else self._slots[n] for n in key]
            used = [slot for name in wanted for slot in self._window(name, self._slots[name])]
            self._last = key, tuple(slots), tuple(used)
            self._trim()
            self.copy_streams.use(used)
            return slots

    def refresh_magnitudes(self) -> None:
        """Recompute DoRA norms and bias differences in place. ConfigError for an unknown format."""
        with self._lock:
            self.copy_streams.use(range(self.max_adapters))
            following = {n: s.host for n, s in self._adapters.items() if s.follows_base and s.host}
            for g, group in enumerate(self._groups):
                copies = following.values()
                measure(group, [f for copy in copies for f in copy.factors.get(g, ())])
            for name, copy in following.items():
                for g, factors in copy.factors.items():
                    if name in self._slots:
                        self._groups[g].bank.write_by_column(self._slots[name], factors)

    def nbytes(self) -> dict[str, int]:
        """Bytes of the banks, of host copies ("host"), and of rereadable files ("disk")."""
        with self._lock:
            every = self._adapters.values()
            return {
                "banks": sum(group.bank.nbytes for group in self._groups),
                "host": sum(stored.nbytes for stored in every),
                "disk": sum(stored.origin.nbytes for stored in every if stored.origin),
            }

    def after_fork(self) -> None:
        self.host.after_fork()
        lock = free_after_fork(self._lock)
        if lock is not self._lock:
            self._lock = lock
            self._put_back()

    def _give_slots(self, wanted: list[str], held: frozenset[int]) -> int:
        self._let_go()
        self._check_known(wanted)
        if len(wanted) > self.max_adapters:
            raise too_many(dict.fromkeys(wanted, 1), self.max_adapters)
        self._mix(wanted)
        had = self._make_resident(wanted, held)
        for name in wanted:
            self._slots.move_to_end(name)
        return had

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
        self._last = None
        self._unmix(stored.name)
        self._retire(stored.name)
        self._replace(stored)
        before = self._adapters.get(stored.name)
        if before is not None:
            self.host.forget(before)
        self._adapters[stored.name] = stored
        self.host.add(stored)

    def _retire(self, name: str) -> None:
        """Rename a version that requests hold, with its slot."""
        self._let_go()
        stored = self._adapters.get(name)
        if stored is None or not any(hold.stored is stored for hold in list(self._held)):
            return
        self._last = None
        stored.host = self.host.get(stored)  # which the request holds
        self.host.forget(stored)
        kept = self._retired[stored.version] = Retired(stored)
        self._adapters[kept] = self._adapters.pop(name)
        if name in self._slots:
            self._slots[kept] = self._slots.pop(name)

    def _let_go(self) -> None:
        if self._retired and self._aside is None:
            for version in self._retired.keys() - self._held_versions():
                self._forget(self._retired.pop(version))

    def _held_versions(self) -> set[int]:
        return {hold.stored.version for hold in list(self._held)}

    def _forget(self, name: str) -> None:
        self._last = None
        self._pinned.discard(name)
        if name not in self._adapters:  # retired
            return
        self.host.forget(self._adapters.pop(name))
        slot = self._slots.pop(name, None)
        if slot is not None:
            self._clear(slot)

    def _unload(self, name: str) -> None:
        self._unmix(name)
        self._retire(name)
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
        summed = dict.fromkeys(member for name in missing for member in members(name))
        copies = {member: self.host.numbers(self._adapters[member]) for member in summed}
        for name in missing:
            stored = mixed(name, self._adapters, copies, self._groups)
            self._adapters[name] = stored
            self.host.add(stored)

    def _unmix(self, name: str) -> None:
        for made in self._sums():
            if name in members(made):
                self._unload(made)

    def _trim(self) -> None:
        if not self.host.over or self._aside is not None:
            return
        held = self._held_versions()
        for name in self._sums():
            if name not in self._slots and self._adapters[name].version not in held:
                undisturbed(partial(self._unload, name))
        undisturbed(lambda: self.host.trim(lambda stored: stored.name in self._pinned))


def _outgrown(stored: StoredAdapter) -> CapacityError:
    if stored.owned:
        return CapacityError(
            f"{stored.name!r} is pinned, and there is no room for its own weights; unpin "
            "it, or compile with a larger LoraConfig(max_own_weights=...)"
        )
    return CapacityError(
        f"{stored.name!r} is pinned, and would take {stored.width} slots in a row now, some of "
        "which are not free; unpin it first"
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
    return AdapterInfo(name, s.source, s.rank, s.sites, s.version, slot, pinned, s.nbytes)
