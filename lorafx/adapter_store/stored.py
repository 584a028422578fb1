"""Decoded adapters, and their host memory in the banks' dtype and layout, within a budget of bytes.

    adapter without a slot → its host copy → the slot
    no host copy           → its files     → a new copy

Over the budget, the least recently used copies of rereadable adapters are dropped. A dropped copy
is found again as long as it is in use.
"""

from __future__ import annotations

import itertools
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple
from weakref import ReferenceType

from torch import Size, Tensor

from lorafx.adapter_store.saved import AdapterSource, Origin
from lorafx.errors import LorafxError
from lorafx.interrupts import free_after_fork, undisturbed
from lorafx.model.bank import Factors, OwnWeight
from lorafx.model.extras import When

next_version = itertools.count(1).__next__


class LoraWeights(NamedTuple):
    """A part's A (r, K), B (N, r) and s; DoRA's `magnitude`, lora_B's `bias` and a replacing
    `own_bias` (N,).

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
        own: site path -> rows of its weight that the adapter replaces.
        replaces_biases: the adapter was trained with biases that replace the base's.
        compared: the file's copies of base weights were compared with the model's.
        invocation: the tokens from which on it is active (aLoRA); empty if always.
    """

    name: str
    weights: dict[str, LoraWeights]
    rank: int
    source: str
    own: Mapping[str, OwnWeight] = field(default_factory=dict)
    replaces_biases: bool = False
    compared: bool = False
    invocation: tuple[int, ...] = ()
    keys: Mapping[str, Size] = field(default_factory=dict)

    @property
    def extras(self) -> dict[When, tuple[str, ...]]:
        """The parts and sites with `EXTRAS`, by their names."""
        parts = self.weights.items()
        return {
            "dora": tuple(path for path, w in parts if w.magnitude is not None),
            "own": tuple(self.own),
            "bias": tuple(p for p, w in parts if w.bias is not None or w.own_bias is not None),
        }


class HostCopy:
    """An adapter's factors and replaced rows by group index. `nbytes` excludes `shared`: a sum's
    tensors from other copies, by id. `again`: reread and not used yet."""

    __slots__ = ("__weakref__", "again", "factors", "nbytes", "own", "shared")

    def __init__(
        self,
        factors: Mapping[int, list[Factors]],
        nbytes: int,
        own: Mapping[int, OwnWeight] | None = None,
        shared: Mapping[int, int] | None = None,
    ) -> None:
        self.factors, self.nbytes = factors, nbytes
        self.own: Mapping[int, OwnWeight] = own or {}
        self.shared = dict(shared or {})
        self.again = False


@dataclass(eq=False)
class StoredAdapter:
    """A loaded adapter. Only its host copy comes and goes.

    Attributes:
        extras: sites with `EXTRAS`, by their names.
        origin: where it can be read again; None where base weights decide its meaning.
        keys: as in `Adapter`, if it cannot be read again.
        version: unique in this process, from 1 on.
        dropped: the dropped copy, while it is in use.
        width: how many slots it takes in a row.
    """

    name: str
    rank: int
    source: str
    sites: tuple[str, ...]
    host: HostCopy | None
    extras: Mapping[When, tuple[str, ...]] = field(default_factory=dict)
    invocation: tuple[int, ...] = ()
    origin: Origin | None = None
    keys: Mapping[str, Size] = field(default_factory=dict)
    width: int = 1
    version: int = field(default_factory=next_version)
    dropped: ReferenceType[HostCopy] | None = None

    @property
    def follows_base(self) -> bool:
        """Whether some numbers are recomputed when base weights change."""
        return bool(self.extras.get("dora") or self.extras.get("bias"))

    @property
    def owned(self) -> tuple[str, ...]:
        """The sites with rows of the adapter's own."""
        return self.extras.get("own", ())

    @property
    def copy(self) -> HostCopy | None:
        return self.host or (None if self.dropped is None else self.dropped())

    @property
    def nbytes(self) -> int:
        copy = self.copy
        return 0 if copy is None else copy.nbytes


class Hold:
    """Keeps a version of an adapter, and its host copy, alive (`AdapterStore.hold`)."""

    __slots__ = ("__weakref__", "name", "numbers", "stored")

    def __init__(self, name: str, stored: StoredAdapter, numbers: HostCopy) -> None:
        self.name, self.stored, self.numbers = name, stored, numbers


class Retired(str):
    """The name of a `replaced` or unloaded version that requests hold; equal only to itself."""

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


class HostTier:
    """The host copies of a store within a budget of bytes (None: no limit). Safe to use from
    several threads; files are read without its lock.

    Attributes:
        hits, misses: adapters written into a slot from host memory, or after rereading.
        changed: failed reads.
        reader: rereads an adapter by source and name; without it nothing is dropped.
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
        return self.budget is not None and self._nbytes > self.budget

    def add(self, stored: StoredAdapter) -> None:
        assert stored.host is not None
        with self._lock:
            self._known.add(stored.version)
            self._keep(stored, stored.host)

    def get(self, stored: StoredAdapter) -> HostCopy | None:
        with self._lock:
            copy = stored.copy
            if copy is not None:
                self._keep(stored, copy)
            return copy

    def numbers(self, stored: StoredAdapter) -> HostCopy:
        """The copy of an adapter, reread if dropped. Raises as `read`."""
        copy = self.get(stored)
        return self.read(stored) if copy is None else copy

    def written(self, copy: HostCopy) -> None:
        self.hits += not copy.again
        copy.again = False

    def read(self, stored: StoredAdapter) -> HostCopy:
        """Reread an adapter; CheckpointError where its files have changed or are unreadable."""
        origin, reader = stored.origin, self.reader
        assert origin is not None, f"{stored.name!r} was dropped"
        assert reader is not None
        self.misses += 1
        try:
            origin.check(stored.name)
            copy = self._fitted(reader(origin.source, stored.name)).host
            origin.check(stored.name)  # unchanged since
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
        """Stop counting an adapter that was unloaded, or is only held."""
        with self._lock:
            self._known.discard(stored.version)
            if self._kept.pop(stored.version, None) is not None:
                self._nbytes -= stored.nbytes

    def trim(self, stays: Callable[[StoredAdapter], bool]) -> None:
        """Drop copies down to the budget, if they can be read again and do not follow the base."""
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
        self._lock = free_after_fork(self._lock)

    def _keep(self, stored: StoredAdapter, copy: HostCopy) -> None:
        if stored.version in self._known:
            if stored.version not in self._kept:
                self._nbytes += copy.nbytes
            stored.host, stored.dropped = copy, None
            self._kept[stored.version] = stored
            self._kept.move_to_end(stored.version)
