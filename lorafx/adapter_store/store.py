"""The store: adapters in host memory by name, and which of them hold a slot of the banks.

    load      checkpoint factors -> host copies in the banks' dtype and layout
    fetch     host copies that the budget left no room for -> read again
    acquire   the names of a batch's rows -> slots; missing adapters are written into free slots,
              or over the least recently used adapter that is neither pinned nor in the batch
    sums      adapters of their own, made of loaded ones when a batch asks for them

Banks are written in place, so compiled graphs and captured addresses stay valid. Everything is
checked before the first write; a call that raises has changed nothing. While a slot is written it
belongs to nobody: no adapter is served from a half-written one, whatever interrupts the write.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from lorafx.adapter_store.asked import check_loaded, outgrown, too_many
from lorafx.adapter_store.dora import refresh
from lorafx.adapter_store.fitting import fitted
from lorafx.adapter_store.holding import Hold, Retired
from lorafx.adapter_store.host_copies import HostCopy, HostTier
from lorafx.adapter_store.names import BASE, Mixture, adapters_among, check_name, members
from lorafx.adapter_store.origins import Origin
from lorafx.adapter_store.stored import StoredAdapter, check_spans, places_of
from lorafx.adapter_store.versions import Versions
from lorafx.interrupts import free_after_fork, undisturbed

if TYPE_CHECKING:
    from lorafx.adapter_store.peft_reader import Adapter
    from lorafx.adapter_store.saved import AdapterSource
    from lorafx.model.sites import Group

T = TypeVar("T")


class AdapterStore(Versions):
    """Adapters by name over the banks of `groups`; safe to use from several threads.

    Args:
        groups: the groups whose banks are filled; each bank has `max_adapters` slots.
        max_adapters: slots, the most distinct adapters in one batch.
        max_rank: largest rank that the banks hold.
        own_weights: for how many adapters they hold weights of their own; None for one a slot.
        max_host_bytes: of the adapters' host copies; None for no limit.
    """

    def __init__(
        self,
        groups: Sequence[Group],
        max_adapters: int,
        max_rank: int,
        own_weights: int | None = None,
        max_host_bytes: int | None = None,
    ) -> None:
        self._groups = tuple(groups)
        places = places_of(self._groups)
        self._fitted = partial(fitted, places=places, groups=self._groups, max_rank=max_rank)
        own = max_adapters if own_weights is None else own_weights
        super().__init__(self._groups, max_adapters, own, HostTier(self._fitted, max_host_bytes))
        self._lock = threading.RLock()

    @property
    def names(self) -> tuple[str, ...]:
        """Loaded adapters, in order of loading."""
        with self._lock:
            return tuple(n for n in self._adapters if not isinstance(n, (Retired, Mixture)))

    @property
    def versions(self) -> dict[str, int]:
        """Loaded adapters -> the version of each."""
        with self._lock:
            return {name: self._adapters[name].version for name in self.names}

    @property
    def resident(self) -> dict[str, int]:
        """Adapters, and sums of some, that hold a slot -> the slot, least recently used first."""
        with self._lock:
            return dict(self._slots)

    @property
    def pinned(self) -> frozenset[str]:
        """Adapters that keep their slot until unpinned or unloaded."""
        with self._lock:
            return frozenset(self._pinned)

    def fits(self, names: frozenset[str], *, own: bool = False) -> bool:
        """Whether these adapters find slots, or with `own` room for their own weights, together."""
        with self._lock:
            return self._together(names, own=own)

    def check_known(self, name: str) -> None:
        """Raise UnknownAdapterError unless this names loaded adapters, or the base."""
        with self._lock:
            self._check_known([name] if name != BASE else [])

    def __contains__(self, name: object) -> bool:
        with self._lock:
            return isinstance(name, str) and all(own in self._adapters for own in members(name))

    def __getitem__(self, name: str) -> StoredAdapter:
        """The stored adapter, or the sum; UnknownAdapterError if there is none of this name. Raises
        as `lorafx.adapter_store.mixing.mixed`."""
        with self._lock:
            self._check_known([name])
            self._mix([name])
            return self._adapters[name]

    def load(self, adapter: Adapter, origin: Origin | None = None) -> None:
        """Keep `adapter` in host memory; it gets a slot when a batch, or a pin, asks for it.
        `origin` says where it can be read again. An adapter of the same name is replaced, and
        rewritten in place if it holds a slot; sums that it is part of are made again.
        Raises CapacityError (rank, room), CheckpointError (sites, sizes, values), ConfigError.
        """
        with self._lock:
            self.loading(adapter, origin)()

    def loading(self, adapter: Adapter, origin: Origin | None = None) -> Callable[[], None]:
        """What does as `load` does, which has been found possible. Raises as that."""
        check_name(adapter.name)
        stored = self._fitted(adapter, origin=origin)
        with self._lock:
            check_spans(stored, self._adapters.values())
            slot = self._slots.get(stored.name) if stored.name in self._pinned else None
            if slot is not None and not self._fits(slot, stored):
                raise outgrown(stored)

        def keep() -> None:
            with self._lock:
                undisturbed(lambda: self._keep(stored))
                self._trim()

        return keep

    def fetch(self, names: Iterable[str | None], *, resident: bool = False) -> list[HostCopy]:
        """The host copies of these adapters, of those with a slot only where `resident` asks, which
        stay in memory as long as what is returned. What was dropped is read again; other threads go
        on meanwhile.

        Raises:
            UnknownAdapterError: a name that is not loaded.
            CheckpointError: a file has changed since it was loaded, or cannot be read.
        """
        found: list[HostCopy] = []
        if self.host.budget is None:
            return found
        for name in adapters_among(names):
            with self._lock:
                self._check_known([name])
                own = members(name) if resident or name not in self._slots else ()
                wanted = [self._adapters[each] for each in own]
                copies = [self.host.get(stored) for stored in wanted]
            for stored, copy in zip(wanted, copies, strict=True):
                found.append(self.host.read(stored) if copy is None else copy)
        with self._lock:
            self._trim()
        return found

    def read_with(self, reader: Callable[[AdapterSource, str], Adapter]) -> None:
        """Read adapters again by this, from a source, by a name; until then none is dropped."""
        with self._lock:
            self.host.reader = reader
            self._trim()

    def numbers(self, name: str) -> HostCopy:
        """The host copy of an adapter, or of a sum. Raises as `__getitem__` and `fetch`."""
        with self._lock:
            return self.host.numbers(self[name])

    def unload(self, name: str) -> None:
        """Forget an adapter, pinned or not, and free its slot."""
        with self._lock:
            self._check_known([name])
            undisturbed(lambda: self._unload(name))

    def pin(self, name: str) -> int:
        """Give an adapter a slot that it keeps until unpinned; returns the slot."""
        kept = self.fetch([name], resident=True)  # noqa: F841 - until it is pinned
        with self._lock:
            self._check_known([name])
            (slot,) = self.acquire([name])
            self._pinned.add(name)
            self.host.numbers(self[name])  # which stays
            return slot

    def unpin(self, name: str) -> None:
        """Let an adapter be evicted again; nothing happens if it was not pinned."""
        with self._lock:
            self._check_known([name])
            self._pinned.discard(name)

    def hold(self, name: str) -> Hold:
        """Keep this version of an adapter for as long as the returned object lives, whatever is
        loaded under the name, or unloaded, meanwhile. Raises as `fetch`."""
        kept = self.fetch([name], resident=True)  # noqa: F841 - until it is held
        with self._lock:
            stored = self[name]
            hold = Hold(name, stored, self.host.numbers(stored))
            self._held.add(hold)
            return hold

    def held_name(self, hold: Hold) -> str:
        """The name by which `acquire` takes the version that is held."""
        return self.held_names([hold])[0]

    def held_names(self, holds: Iterable[Hold]) -> list[str]:
        """The names by which `acquire` takes the versions that are held."""
        with self._lock:
            loaded, retired = self._adapters, self._retired
            return [
                hold.name if loaded.get(hold.name) is hold.stored else retired[hold.stored.version]
                for hold in holds
            ]

    def set_aside(self, action: Callable[[], T]) -> T:
        """What `action` returns with an empty store; afterwards everything is as it was, in the
        same slots.

        Other threads that ask for the store wait. Slots that were written meanwhile are written
        again with what they held, or cleared.
        """
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
                except BaseException:  # of a signal that came before it began
                    undisturbed(self._put_back)
                    raise

    def acquire(self, names: Sequence[str | None], held: frozenset[int] = frozenset()) -> list[int]:
        """The slot of each row's adapter, -1 for None and "__base__".

        `held` are slots that calls around the running one go on to read, which keep what they hold.

        Raises UnknownAdapterError for names that are not loaded, CapacityError when the batch
        has more distinct adapters than there are slots, or than pinned ones leave free, or for a
        sum whose ranks find no room; ConfigError for a sum that cannot be made.
        """
        key = tuple(names)
        with self._lock:
            if self._last is not None and self._last[0] == key:
                self.copy_streams.use(self._last[2])
                return list(self._last[1])  # decoding asks for the same rows step after step
            wanted = adapters_among(key)
            self.hits += self._give_slots(wanted, held)
            slots = [-1 if n is None or n == BASE else self._slots[n] for n in key]
            used = [slot for name in wanted for slot in self._window(name, self._slots[name])]
            self._last = key, tuple(slots), tuple(used)
            self._trim()
            self.copy_streams.use(used)
            return slots

    def fill(self, names: Sequence[str | None], held: frozenset[int] = frozenset()) -> list[int]:
        """Give slots to these adapters before a batch asks for them; returns the slots. What does
        not use these waits for no copy where `copy_streams.beside`. Raises as `acquire`."""
        with self._lock:
            wanted = adapters_among(names)
            self._give_slots(wanted, held)
            self._trim()
            return [self._slots[name] for name in wanted]

    def refresh_magnitudes(self) -> None:
        """Take the norms of all loaded DoRA adapters, and the differences of adapters' own biases,
        again from the base weights as they are now.

        For whoever changes base weights: host copies and slots are rewritten in place, so graphs
        stay. Nothing is done where no adapter has either.

        Raises:
            ConfigError: a base weight is in no known format any more.
        """
        with self._lock:
            self.copy_streams.use(range(self.max_adapters))
            refresh(self._groups, self._adapters, self._slots)

    def nbytes(self) -> dict[str, int]:
        """Bytes of the banks ("banks"), of the adapters in host memory ("host"), and of the files
        of those that can be read again ("disk")."""
        with self._lock:
            every = self._adapters.values()
            return {
                "banks": sum(group.bank.nbytes for group in self._groups),
                "host": sum(stored.nbytes for stored in every),
                "disk": sum(stored.origin.nbytes for stored in every if stored.origin),
            }

    def after_fork(self) -> None:
        """In a child process: free of what other threads of the parent were doing."""
        self.host.after_fork()
        lock = free_after_fork(self._lock)
        if lock is not self._lock:
            self._lock = lock
            self._put_back()

    def _give_slots(self, wanted: list[str], held: frozenset[int]) -> int:
        """Give slots to the adapters of a batch, which are used now; how many had one."""
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
        check_loaded(names, self._adapters, lambda: self.names)
