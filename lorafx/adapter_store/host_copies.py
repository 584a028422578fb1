"""Host memory: the factors of adapters in the banks' dtype and layout, under a budget of bytes.

    adapter without a slot → its host copy → the slot
    no host copy           → its files     → a new one

Over the budget the copies go that were used least recently, of adapters that can be read again. A
copy that somebody still uses stays in memory until nobody does, and is found again until then.
"""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from lorafx.errors import LorafxError
from lorafx.interrupts import free_after_fork, undisturbed

if TYPE_CHECKING:
    from lorafx.adapter_store.peft_reader import Adapter
    from lorafx.adapter_store.saved import AdapterSource
    from lorafx.adapter_store.stored import StoredAdapter
    from lorafx.model.bank import Factors, OwnWeight


class HostCopy:
    """The numbers of an adapter in host memory.

    Attributes:
        factors: index of a group -> that group's factors, in its bank's dtype and layout.
        own: index of a group -> the rows that it has of its own of the weight of its one site.
        nbytes: host memory that they take, beside what is `shared`.
        shared: of a sum, the bytes of the tensors that are those of another copy, by its id.
        again: they were just read again, and not used yet.
    """

    __slots__ = ("__weakref__", "again", "factors", "nbytes", "own", "shared")

    def __init__(
        self,
        factors: Mapping[int, list[Factors]],
        nbytes: int,
        own: Mapping[int, OwnWeight] | None = None,
        shared: Mapping[int, int] | None = None,
    ) -> None:
        self.factors, self.nbytes = factors, nbytes
        self.own: Mapping[int, OwnWeight] = {} if own is None else own
        self.shared = dict(shared or {})
        self.again = False


class HostTier:
    """The copies of the adapters of one store. Safe to use from several threads; files are read
    without its lock.

    Args:
        fitted: an adapter as the banks take it.
        budget: bytes; None for no limit.

    Attributes:
        hits: adapters that were written into a slot from host memory.
        misses: those that were read again for it.
        changed: reads that failed.
        evictions: copies that were dropped.
        reader: reads an adapter again, by its source and name; None where nothing can be dropped.
            By the session.
    """

    def __init__(self, fitted: Callable[[Adapter], StoredAdapter], budget: int | None) -> None:
        self.budget = budget
        self.hits = self.misses = self.changed = self.evictions = 0
        self.reader: Callable[[AdapterSource, str], Adapter] | None = None
        self._fitted = fitted
        self._lock = threading.RLock()
        self._known: set[int] = set()  # versions that are loaded
        self._kept: OrderedDict[int, StoredAdapter] = OrderedDict()  # by version; last is newest
        self._nbytes = 0

    @property
    def over(self) -> bool:
        """Whether the copies that are kept are over the budget."""
        return self.budget is not None and self._nbytes > self.budget

    def add(self, stored: StoredAdapter) -> None:
        """Keep the copy of an adapter that was just loaded."""
        assert stored.host is not None
        with self._lock:
            self._known.add(stored.version)
            self._keep(stored, stored.host)

    def get(self, stored: StoredAdapter) -> HostCopy | None:
        """The copy of an adapter, which is used now; None where there is none."""
        with self._lock:
            copy = stored.host
            if copy is None and stored.dropped is not None:
                copy = stored.dropped()
            if copy is not None:
                self._keep(stored, copy)
            return copy

    def numbers(self, stored: StoredAdapter) -> HostCopy:
        """The copy of an adapter, which is read where there is none. Raises as `read`."""
        copy = self.get(stored)
        return self.read(stored) if copy is None else copy

    def written(self, copy: HostCopy) -> None:
        """Count a copy that goes into a slot."""
        self.hits += not copy.again
        copy.again = False

    def read(self, stored: StoredAdapter) -> HostCopy:
        """Read an adapter again.

        Raises:
            CheckpointError: its files have changed since it was loaded, or cannot be read.
        """
        origin, reader = stored.origin, self.reader
        assert origin is not None, f"{stored.name!r} was dropped"
        assert reader is not None
        self.misses += 1
        try:
            origin.check(stored.name)
            copy = self._fitted(reader(origin.source, stored.name)).host
            origin.check(stored.name)  # nor did they change meanwhile
        except LorafxError:
            self.changed += 1
            raise
        assert copy is not None
        copy.again = True
        with self._lock:
            known = self.get(stored)  # another thread was first
            if known is not None:
                return known
            undisturbed(lambda: self._keep(stored, copy))
            return copy

    def forget(self, stored: StoredAdapter) -> None:
        """An adapter was unloaded, or only requests under way hold it: it counts no more."""
        with self._lock:
            self._known.discard(stored.version)
            if self._kept.pop(stored.version, None) is not None:
                self._nbytes -= stored.nbytes

    def trim(self, stays: Callable[[StoredAdapter], bool]) -> None:
        """Drop copies until the rest is within the budget. Those stay that cannot be read again,
        and those whose numbers follow the base weights: DoRA, biases."""
        if self.reader is None:
            return
        with self._lock:
            self._nbytes = sum(stored.nbytes for stored in self._kept.values())
            for stored in list(self._kept.values()):
                copy = stored.host
                if not self.over:
                    return
                if copy is None or stored.origin is None or stored.follows_base or stays(stored):
                    continue
                self._kept.pop(stored.version)
                self._nbytes -= copy.nbytes
                for other in self._kept.values():  # a sum goes on to hold tensors of it
                    if other.host is not None:
                        grown = other.host.shared.pop(id(copy), 0)
                        other.host.nbytes += grown
                        self._nbytes += grown
                stored.dropped, stored.host = weakref.ref(copy), None
                self.evictions += 1

    def after_fork(self) -> None:
        """In a child process: free of what other threads of the parent were doing."""
        self._lock = free_after_fork(self._lock)

    def _keep(self, stored: StoredAdapter, copy: HostCopy) -> None:
        if stored.version in self._known:
            if stored.version not in self._kept:
                self._nbytes += copy.nbytes
            stored.host, stored.dropped = copy, None
            self._kept[stored.version] = stored
            self._kept.move_to_end(stored.version)
