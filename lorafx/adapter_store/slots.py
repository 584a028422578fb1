"""The part of the store that is about slots: who has which, who loses one, what is written there.

Banks are written in place. While a slot is written it belongs to nobody. The store's lock is held
by whoever calls.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lorafx.adapter_store.asked import room_for
from lorafx.adapter_store.own_places import OwnPlaces
from lorafx.errors import LorafxError

if TYPE_CHECKING:
    from lorafx.adapter_store.host_copies import HostTier
    from lorafx.adapter_store.stored import StoredAdapter
    from lorafx.model.sites import Group


class Slots:
    """Slots of the banks of `groups`.

    Args:
        max_adapters: slots, the most distinct adapters in one batch.
        own_weights: how many of them have room for weights of their own.
        host: what adapters are written from.
    """

    def __init__(
        self, groups: Sequence[Group], max_adapters: int, own_weights: int, host: HostTier
    ) -> None:
        self._groups = tuple(groups)
        self._own = OwnPlaces(own_weights)
        self.max_adapters, self.host = max_adapters, host
        #: As in lorafx.session.statistics.
        self.hits = self.loads = self.evictions = 0
        self._adapters: dict[str, StoredAdapter] = {}
        self._slots: OrderedDict[str, int] = OrderedDict()  # least recently used first
        self._pinned: set[str] = set()
        self._last: tuple[tuple[str | None, ...], tuple[int, ...]] | None = None
        self._written: set[int] = set()  # slots, inside `set_aside`
        self._aside: Any = None  # what the store held, inside `set_aside`

    def _owners(self) -> dict[str, int]:
        """The slots of adapters with weights of their own."""
        return {name: slot for name, slot in self._slots.items() if self._adapters[name].owned}

    def _fits(self, slot: int, stored: StoredAdapter) -> bool:
        """Whether the banks have room for what goes into `slot`."""
        return not stored.owned or self._own.free(slot, self._owners().values()) is not None

    def _put_back(self) -> None:
        """What `set_aside` took away."""
        if self._aside is None:
            return
        self._last = None
        self._adapters, slots, self._pinned = self._aside
        self._slots = OrderedDict((n, s) for n, s in slots.items() if s not in self._written)
        holders = {slot: name for name, slot in slots.items()}
        while self._written:
            slot = next(iter(self._written))
            if slot in holders:
                try:
                    self._write(slot, self._adapters[holders[slot]])
                except LorafxError:  # its files have changed; who asks for it will hear of that
                    self._clear(slot)
                    del slots[holders[slot]]
            else:
                self._clear(slot)
            self._written.discard(slot)
        self._slots, self._aside = slots, None

    def _make_resident(self, wanted: list[str], held: frozenset[int]) -> int:
        """Give slots to those of `wanted` that have none; how many had one."""
        missing = [name for name in wanted if name not in self._slots]
        if not missing:
            return len(wanted)
        free, evictable = room_for(wanted, self._slots, self._pinned, held, self.max_adapters)
        owners = self._owners()
        evicted = self._own.to_evict(
            [name for name in missing if self._adapters[name].owned], [*owners], evictable
        )
        # Before anything changes: a file may be gone.
        copies = [self.host.numbers(self._adapters[name]) for name in missing]
        self._last = None
        for name in evicted:
            evictable.remove(name)
            free.append(self._slots.pop(name))
            self._clear(free[-1])
            self.evictions += 1
        for name, copy in zip(missing, copies, strict=True):
            self.loads += 1
            self.host.written(copy)
            self.evictions += not free
            slot = free.pop(0) if free else self._slots.pop(evictable.pop(0))
            # Between here and the assignment the slot belongs to nobody: if the device fails
            # in the middle, the store still tells the truth.
            self._write(slot, self._adapters[name])
            self._slots[name] = slot
        return len(wanted) - len(missing)

    def _write(self, slot: int, stored: StoredAdapter) -> None:
        if self._aside is not None:
            self._written.add(slot)
        numbers, owners = self.host.numbers(stored), self._owners().values()
        place = self._own.take(slot, owners) if numbers.own else 0
        for g, group in enumerate(self._groups):
            factors, own = numbers.factors.get(g), numbers.own.get(g)
            if factors or own:
                group.bank.write(slot, factors or (), own, place)
            else:
                group.bank.clear(slot)

    def _clear(self, slot: int) -> None:
        for group in self._groups:
            group.bank.clear(slot)
