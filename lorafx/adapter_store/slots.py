"""The part of the store that is about slots: who has which, who loses one, what is written there.

Banks are written in place. While a slot is written it belongs to nobody. The store's lock is held
by whoever calls.

Where adapters' own weights lie in the banks, which have room for those of some slots at a time.

A place belongs to a slot as long as the slot holds an adapter with weights of its own; who holds
which slot is for the store to say.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from lorafx.adapter_store.asked import evictable_for, no_slots, owning, too_many
from lorafx.adapter_store.copy_streams import CopyStreams
from lorafx.adapter_store.holding import staying
from lorafx.adapter_store.names import members
from lorafx.adapter_store.windows import arranged, fit, window
from lorafx.errors import CapacityError, LorafxError


class OwnPlaces:
    """The places of `count` adapters with weights of their own."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._by_slot: dict[int, int] = {}

    def free(self, slot: int, holding: Iterable[int]) -> int | None:
        """The place for `slot`: where it had one, or one that none of the slots `holding` has. None
        where there is none."""
        taken = {self._by_slot[other] for other in holding if other != slot}
        own = self._by_slot.get(slot)
        if own is not None and own not in taken:
            return own
        return min(set(range(self.count)).difference(taken), default=None)

    def take(self, slot: int, holding: Iterable[int]) -> int:
        """Give `slot` the place of `free`, which there is."""
        place = self.free(slot, holding)
        assert place is not None, f"slot {slot} was promised a place"
        self._by_slot[slot] = place
        return place

    def to_evict(
        self, missing: Sequence[str], resident: Sequence[str], evictable: Sequence[str]
    ) -> list[str]:
        """Those of `evictable` that have to make room for the own weights of `missing`, in their
        order. `resident` are all that have a place.

        Raises:
            CapacityError: that would not be enough.
        """
        lacking = len(missing) + len(resident) - self.count
        if not missing or lacking <= 0:
            return []
        made = [name for name in evictable if name in resident][:lacking]
        if len(made) < lacking:
            needed = self.count - len(made) + lacking
            raise CapacityError(
                f"no room for the own weights of {', '.join(missing)}: the banks hold those of at "
                f"most {self.count} at a time; compile with "
                f"LoraConfig(max_own_weights={needed}), unpin adapters, or split the batch"
            )
        return made


if TYPE_CHECKING:
    from torch import Tensor

    from lorafx.adapter_store.host_copies import HostTier
    from lorafx.adapter_store.stored import StoredAdapter
    from lorafx.model.sites import Group


class Slots:
    """Slots of the banks of `groups`.

    Args:
        max_adapters: slots, the most distinct adapters in one batch. One of a rank over that of a
            slot takes several (lorafx.adapter_store.windows); its slot is the first of them.
        own_weights: how many of them have room for weights of their own.
        host: what adapters are written from.
    """

    def __init__(
        self, groups: Sequence[Group], max_adapters: int, own_weights: int, host: HostTier
    ) -> None:
        self._groups = tuple(groups)
        self._own = OwnPlaces(own_weights)
        self._widest = max((g.bank.width(g.bank.max_rank) for g in groups), default=1)
        self.max_adapters, self.host = max_adapters, host
        self.copy_streams = CopyStreams([t for g in groups for t in g.bank.tensors.values()])
        #: As in lorafx.session.statistics.
        self.hits = self.loads = self.evictions = 0
        self._adapters: dict[str, StoredAdapter] = {}
        self._slots: OrderedDict[str, int] = OrderedDict()  # least recently used first
        self._pinned: set[str] = set()
        #: The rows of the last batch, the slot of each, and all that they use.
        self._last: tuple[tuple[str | None, ...], tuple[int, ...], tuple[int, ...]] | None = None
        self._written: set[int] = set()  # slots, inside `set_aside`
        self._aside: Any = None  # what the store held, inside `set_aside`

    def _owners(self) -> dict[str, int]:
        """The slots of adapters with weights of their own."""
        return {name: slot for name, slot in self._slots.items() if self._adapters[name].owned}

    def _together(self, names: frozenset[str], *, own: bool) -> bool:
        pinned = staying(self._pinned, names)
        placed = owning(names | pinned, self._adapters) <= self._own.count
        if own or not placed:
            return placed
        kept = {name: slot for name, slot in self._slots.items() if name in pinned}
        widths = {name: self._width(name) for name in names | pinned}
        return fit(widths, kept, self.max_adapters, self._widest)

    def _window(self, name: str, slot: int) -> range:
        """The slots that a loaded adapter takes from `slot` on."""
        return window(slot, self._adapters[name].width, self.max_adapters)

    def _width(self, name: str) -> int:
        """How many slots an adapter takes in a row. A sum that is not made yet takes at most as
        many as its members."""
        if name in self._adapters:
            return self._adapters[name].width
        return sum(self._adapters[own].width for own in members(name))

    def _fits(self, slot: int, stored: StoredAdapter) -> bool:
        """Whether the banks have room for what goes into `slot` in the place of what is there."""
        if stored.owned and self._own.free(slot, self._owners().values()) is None:
            return False
        others = {s for n, first in self._slots.items() for s in self._window(n, first)}
        others.difference_update(self._window(stored.name, slot))
        return others.isdisjoint(window(slot, stored.width, self.max_adapters))

    def _put_back(self) -> None:
        """What `set_aside` took away."""
        if self._aside is None:
            return
        self._last = None
        self._adapters, slots, self._pinned = self._aside
        windows = {name: self._window(name, slot) for name, slot in slots.items()}
        touched = {n for n, own in windows.items() if not self._written.isdisjoint(own)}
        self._slots = OrderedDict((n, s) for n, s in slots.items() if n not in touched)
        holders = {slot: name for name in touched for slot in windows[name]}
        while self._written:
            slot = next(iter(self._written))
            name = holders.get(slot)
            own = range(slot, slot + 1) if name is None else windows[name]
            for each in own:
                self._clear(each)
            if name is not None:
                try:
                    self._write(slots[name], self._adapters[name])
                except LorafxError:
                    # Its files have changed, which is found before anything is written. Who asks
                    # for it will hear of that.
                    del slots[name]
            self._written.difference_update(own)
        self._slots, self._aside = slots, None

    def _make_resident(self, wanted: list[str], held: frozenset[int]) -> int:
        """Give slots to those of `wanted` that have none; how many had one."""
        missing = [name for name in wanted if name not in self._slots]
        if not missing:
            return len(wanted)
        self.copy_streams.refuse_captured(missing)
        every = {name: self._adapters[name].width for name in wanted}
        if not fit(every, {}, self.max_adapters, self._widest):
            raise too_many(every, self.max_adapters)
        evictable, kept = evictable_for(wanted, self._slots, self._pinned, held)
        owners = self._owners()
        evicted = self._own.to_evict(
            [name for name in missing if self._adapters[name].owned], [*owners], evictable
        )
        slots = {name: slot for name, slot in self._slots.items() if name not in evicted}
        widths = {name: self._adapters[name].width for name in [*slots, *missing]}
        staying = [name for name in evictable if name not in evicted]
        places = arranged(widths, slots, staying, kept, self.max_adapters, self._widest)
        if places is None:
            lacking = {name: widths[name] for name in missing}
            raise no_slots(lacking, kept.difference(wanted) or kept, self.max_adapters)
        # Before anything changes: a file may be gone.
        copies = {name: self.host.numbers(self._adapters[name]) for name in places}
        self._last = None
        taken = {slot for name, first in places.items() for slot in self._window(name, first)}
        evicted += [n for n in staying if not taken.isdisjoint(self._window(n, slots[n]))]
        for name in [*evicted, *(name for name in places if name in self._slots)]:
            slot = self._slots.pop(name)
            if slot not in places.values():  # what is not written anew
                self._clear(slot)
        self.evictions += len(evicted)
        for name, slot in places.items():
            self.loads += 1
            self.host.written(copies[name])
            # Between here and the assignment the slot belongs to nobody: if the device fails
            # in the middle, the store still tells the truth.
            self._write(slot, self._adapters[name], beside=True)
            self._slots[name] = slot
        return len(wanted) - len(missing)

    def _replace(self, stored: StoredAdapter) -> None:
        """Write an adapter into the slot of the one that it replaces, where that has one."""
        slot = self._slots.get(stored.name)
        if slot is None:
            return
        if not self._fits(slot, stored):
            del self._slots[stored.name]  # it gets one when a batch asks for it
            self._clear(slot)
            return
        order = list(self._slots)
        del self._slots[stored.name]
        self._write(slot, stored)
        self._slots[stored.name] = slot
        for name in order[order.index(stored.name) + 1 :]:  # used as recently as before
            self._slots.move_to_end(name)

    def _write(self, slot: int, stored: StoredAdapter, *, beside: bool = False) -> None:
        """Write an adapter into a slot: in the turn of the current stream, or `beside` it."""
        taken = window(slot, stored.width, self.max_adapters)
        if self._aside is not None:
            self._written.update(taken)
        numbers, owners = self.host.numbers(stored), self._owners().values()
        place = self._own.take(slot, owners) if numbers.own else 0

        def write() -> list[object]:
            sources: list[object] = [numbers]
            for g, group in enumerate(self._groups):
                factors, own = numbers.factors.get(g), numbers.own.get(g)
                if factors or own:
                    sources += group.bank.write(slot, factors or (), own, place)
                else:
                    sources += group.bank.clear(slot)
            return sources

        # The place of weights of its own may have been that of any slot.
        behind = range(self.max_adapters) if numbers.own else taken
        if beside:
            self.copy_streams.copy(stored.name, taken, write, behind)
        else:
            self.copy_streams.write(stored.name, behind, write)

    def _clear(self, slot: int) -> None:
        def clear() -> list[Tensor]:
            return [source for group in self._groups for source in group.bank.clear(slot)]

        self.copy_streams.copy(f"slot {slot}", range(slot, slot + 1), clear)
