"""The slots of the banks: assignment, eviction and writes.

Banks are written in place. A slot belongs to no adapter while it is written. Callers hold the
store's lock.

An adapter of larger rank takes a window, several slots in a row: ⌈rank / slot rank⌉, the most of
any bank. The last slot has room for the largest rank (lorafx.model.bank), so a window may reach
past it. Hence adapters fit wherever the widths of all but the widest sum up to less than the number
of slots and all windows may move.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import TYPE_CHECKING, Any

from lorafx.adapter_store.copy_streams import CopyStreams
from lorafx.adapter_store.names import Mixture, members
from lorafx.adapter_store.stored import HostTier, Retired, StoredAdapter
from lorafx.errors import CapacityError, LorafxError

if TYPE_CHECKING:
    from torch import Tensor

    from lorafx.model.bank import Factors
    from lorafx.model.sites import Group


class OwnPlaces:
    """Places of replaced weights in the banks, which follow the slots of their adapters."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._by_slot: dict[int, int] = {}

    def free(self, slot: int, holding: Iterable[int]) -> int | None:
        """The place of `slot`, or a place that no slot in `holding` has, if any."""
        taken = {self._by_slot[other] for other in holding if other != slot}
        known = self._by_slot.get(slot)
        if known is not None and known not in taken:
            return known
        return min(set(range(self.count)).difference(taken), default=None)

    def take(self, slot: int, holding: Iterable[int]) -> int:
        place = self.free(slot, holding)
        assert place is not None, f"slot {slot} was promised a place"
        self._by_slot[slot] = place
        return place

    def to_evict(
        self, missing: Sequence[str], resident: Collection[str], evictable: Sequence[str]
    ) -> list[str]:
        """The first of `evictable` that make room for `missing`, or CapacityError."""
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


class Slots:
    """The slots in the banks of `groups`, `own_weights` of them with room for replaced weights. A
    window is named by its first slot."""

    def __init__(
        self, groups: Sequence[Group], max_adapters: int, own_weights: int, host: HostTier
    ) -> None:
        self._groups = tuple(groups)
        self._own = OwnPlaces(own_weights)
        self._widest = max((g.bank.width(g.bank.max_rank) for g in groups), default=1)
        self.max_adapters, self.host = max_adapters, host
        self.copy_streams = CopyStreams([t for g in groups for t in g.bank.tensors.values()])
        self.hits = self.loads = self.evictions = 0
        self._adapters: dict[str, StoredAdapter] = {}
        self._slots: OrderedDict[str, int] = OrderedDict()  # least recently used first
        self._pinned: set[str] = set()
        #: The rows of the last batch, their slots, and all slots of these.
        self._last: tuple[tuple[str | None, ...], tuple[int, ...], tuple[int, ...]] | None = None
        self._written: set[int] = set()  # slots, inside `set_aside`
        self._aside: Any = None  # what the store held, inside `set_aside`

    def _owners(self) -> dict[str, int]:
        return {name: slot for name, slot in self._slots.items() if self._adapters[name].owned}

    def _owning(self, names: Iterable[str]) -> int:
        """How many of these replace weights; a sum does only as a single adapter at weight 1."""
        parts = (
            [member for member, weight in name.weights if weight]
            if isinstance(name, Mixture)
            else [name]
            for name in names
        )
        adapters = self._adapters
        return sum(any(n in adapters and adapters[n].owned for n in part) for part in parts)

    def _staying(self, wanted: Collection[str]) -> set[str]:
        """Pinned adapters beside `wanted`; held versions share the slot of a pinned name."""
        replaced = {name.replaced for name in wanted if isinstance(name, Retired)}
        return self._pinned - (replaced - set(wanted))

    def _together(self, names: frozenset[str], *, own: bool) -> bool:
        pinned = self._staying(names)
        placed = self._owning(names | pinned) <= self._own.count
        if own or not placed:
            return placed
        kept = {name: slot for name, slot in self._slots.items() if name in pinned}
        widths = {name: self._width(name) for name in names | pinned}
        return _fit(widths, kept, self.max_adapters, self._widest)

    def _window(self, name: str, slot: int) -> range:
        return window(slot, self._adapters[name].width, self.max_adapters)

    def _width(self, name: str) -> int:
        """The number of slots of an adapter; a sum not yet made takes at most its members'."""
        if name in self._adapters:
            return self._adapters[name].width
        return sum(self._adapters[member].width for member in members(name))

    def _fits(self, slot: int, stored: StoredAdapter) -> bool:
        if stored.owned and self._own.free(slot, self._owners().values()) is None:
            return False
        others = {s for n, first in self._slots.items() for s in self._window(n, first)}
        others.difference_update(self._window(stored.name, slot))
        return others.isdisjoint(window(slot, stored.width, self.max_adapters))

    def _put_back(self) -> None:
        if self._aside is None:
            return
        self._last = None
        self._adapters, slots, self._pinned = self._aside
        windows = {name: self._window(name, slot) for name, slot in slots.items()}
        touched = {n for n, taken in windows.items() if not self._written.isdisjoint(taken)}
        self._slots = OrderedDict((n, s) for n, s in slots.items() if n not in touched)
        holders = {slot: name for name in touched for slot in windows[name]}
        while self._written:
            slot = next(iter(self._written))
            name = holders.get(slot)
            taken = range(slot, slot + 1) if name is None else windows[name]
            for written in taken:
                self._clear(written)
            if name is not None:
                try:
                    self._write(slots[name], self._adapters[name])
                except LorafxError:
                    # Its files have changed, which is found before any write; its next user gets
                    # the error.
                    del slots[name]
            self._written.difference_update(taken)
        self._slots, self._aside = slots, None

    def _make_resident(self, wanted: list[str], held: frozenset[int]) -> int:
        """Give slots to `wanted`, sparing `held` ones; returns how many had one."""
        missing = [name for name in wanted if name not in self._slots]
        if not missing:
            return len(wanted)
        self.copy_streams.refuse_captured(missing)
        every = {name: self._adapters[name].width for name in wanted}
        if not _fit(every, {}, self.max_adapters, self._widest):
            raise too_many(every, self.max_adapters)
        pinned = self._staying(wanted)
        kept = {name for name, slot in self._slots.items() if name in pinned or slot in held}
        evictable = [name for name in self._slots if name not in wanted and name not in kept]
        owning = [name for name in missing if self._adapters[name].owned]
        evicted = self._own.to_evict(owning, self._owners(), evictable)
        slots = {name: slot for name, slot in self._slots.items() if name not in evicted}
        widths = {name: self._adapters[name].width for name in [*slots, *missing]}
        staying = [name for name in evictable if name not in evicted]
        places = _arranged(widths, slots, staying, kept, self.max_adapters, self._widest)
        if places is None:
            lacking = {name: widths[name] for name in missing}
            raise no_slots(lacking, kept.difference(wanted) or kept, self.max_adapters)
        # Before anything changes, since a file may be gone.
        copies = {name: self.host.numbers(self._adapters[name]) for name in places}
        self._last = None
        taken = {slot for name, first in places.items() for slot in self._window(name, first)}
        evicted += [n for n in staying if not taken.isdisjoint(self._window(n, slots[n]))]
        for name in [*evicted, *(name for name in places if name in self._slots)]:
            slot = self._slots.pop(name)
            if slot not in places.values():  # slots that keep their contents
                self._clear(slot)
        self.evictions += len(evicted)
        for name, slot in places.items():
            self.loads += 1
            self.host.written(copies[name])
            # Until the assignment the slot belongs to no adapter: after a device failure the store
            # is consistent.
            self._write(slot, self._adapters[name], beside=True)
            self._slots[name] = slot
        return len(wanted) - len(missing)

    def _replace(self, stored: StoredAdapter) -> None:
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

        # The place of replaced weights may have been any slot's.
        behind = range(self.max_adapters) if numbers.own else taken
        if beside:
            self.copy_streams.copy(stored.name, taken, write, behind)
        else:
            self.copy_streams.write(stored.name, behind, write)

    def _clear(self, slot: int) -> None:
        def clear() -> list[Tensor]:
            return [source for group in self._groups for source in group.bank.clear(slot)]

        self.copy_streams.copy(f"slot {slot}", range(slot, slot + 1), clear)


def too_many(wanted: Mapping[str, int], slots: int) -> CapacityError:
    """A batch's adapters exceed the slots; `wanted` has the slots of each."""
    if len(wanted) > slots:
        return CapacityError(
            f"the batch has {len(wanted)} distinct adapters ({', '.join(wanted)}), but "
            f"there are only {slots} slots; split the batch, or compile "
            f'with LoraConfig(max_adapters={len(wanted)}) or Options(overflow="waves"), which '
            "serves requests in turn where each finds slots beside pinned adapters"
        )
    needed = sum(wanted.values()) - max(wanted.values()) + 1
    widths = ", ".join(f"{name} {width}" for name, width in wanted.items())
    return CapacityError(
        f"the adapters of the batch take {needed} slots by their ranks ({widths}; one of them may "
        f"reach past the last slot), but there are only {slots}; split the batch, or compile with "
        f'LoraConfig(max_adapters={needed}), a larger slot_rank, or Options(overflow="waves")'
    )


def no_slots(missing: Mapping[str, int], kept: AbstractSet[str], slots: int) -> CapacityError:
    """The other slots are `kept`; `missing` has the slots of each."""
    lacking = ", ".join(
        name if width == 1 else f"{name} ({width} slots in a row)"
        for name, width in missing.items()
    )
    return CapacityError(
        f"no slots for {lacking}: {slots} slots, of which "
        f"those of {', '.join(sorted(kept))} are pinned, or used by the call around this one; "
        "unpin_adapter() some, split the batch, or "
        "compile with a larger LoraConfig(max_adapters=...)"
    )


def width_of(groups: Sequence[Group], factors: Mapping[int, Iterable[Factors]]) -> int:
    """The slots in a row of an adapter with these factors by group."""
    widths = (groups[g].bank.width(f.rank) for g, of_group in factors.items() for f in of_group)
    return max(widths, default=1)


def window(first: int, width: int, count: int) -> range:
    """The slots, of `count`, of an adapter in slot `first`."""
    return range(first, min(first + width, count))


def _fit(widths: Mapping[str, int], kept: Mapping[str, int], count: int, widest: int) -> bool:
    """Whether adapters of these widths find slots together, with those of `kept` in place; a fast
    form of `_arranged` for each step of an engine."""
    most = max(widths.values(), default=0)
    if most > 1 and kept:
        return _arranged(widths, kept, (), kept, count, widest) is not None
    return sum(widths.values()) - most < count


def _arranged(
    widths: Mapping[str, int],
    slots: Mapping[str, int],
    evictable: Sequence[str],
    kept: Collection[str],
    count: int,
    widest: int,
) -> dict[str, int] | None:
    """The first slot of each adapter that moves, or None where they do not fit into `count` slots.

    `slots` are the current first slots. The `evictable` may lose theirs, least recently used first,
    after free slots are used up; the `kept` stay. If that fails, all evictable ones go and others
    may move. The last slot is left for the `widest` possible adapter, if possible.
    """
    windows = {name: window(first, widths[name], count) for name, first in slots.items()}
    missing = {name: width for name, width in widths.items() if name not in slots}
    placed = _placed(missing, windows, evictable, count, widest)
    if placed is not None:
        return placed
    moving = {n: width for n, width in widths.items() if n not in evictable and n not in kept}
    staying = {name: slots for name, slots in windows.items() if name in kept}
    return _placed(moving, staying, (), count, max(moving.values()))


def _placed(
    widths: Mapping[str, int],
    windows: Mapping[str, range],
    evictable: Sequence[str],
    count: int,
    widest: int,
) -> dict[str, int] | None:
    """First slots, widest adapters first, evicting only `evictable`. Adapters of width `widest` go
    to the highest slots and others to the lowest, which keeps the gap in one piece."""
    age = {name: number for number, name in enumerate(evictable)}
    taken: list[str | None] = [None] * count
    for name, slots in windows.items():
        for slot in slots:
            taken[slot] = name
    found: dict[str, int] = {}
    for name in sorted(widths, key=lambda name: -widths[name]):
        width = widths[name]
        costs: list[tuple[int, int, int, int]] = []
        for first in range(count):
            others = {taken[slot] for slot in window(first, width, count)}
            ages = [age.get(other, -1) for other in others if other is not None]
            if -1 not in ages:
                at = -first if width == widest > 1 else first
                costs.append((max(ages, default=-1), len(ages), at, first))
        if not costs:
            return None
        *_, found[name] = min(costs)
        slots = window(found[name], width, count)
        gone = {taken[slot] for slot in slots}
        taken = [None if other in gone else other for other in taken]
        for slot in slots:
            taken[slot] = name
    return found
