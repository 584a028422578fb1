"""Windows: the slots in a row that an adapter takes, ⌈rank / slot rank⌉, the most of any bank.

The last slot has room for the largest rank (lorafx.model.bank), so a window may reach past it.
Hence adapters fit wherever the widths of all but the widest add up to less than the number of slots
and all windows may move. A window is named by its first slot.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence


def window(first: int, width: int, count: int) -> range:
    """The slots, of `count`, of an adapter in slot `first`."""
    return range(first, min(first + width, count))


def arranged(
    widths: Mapping[str, int],
    slots: Mapping[str, int],
    evictable: Sequence[str],
    kept: Collection[str],
    count: int,
    widest: int,
) -> dict[str, int] | None:
    """The first slot of each adapter that is to be written, or None where they do not fit.

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
    staying = {name: windows[name] for name in kept}
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
    owners: list[str | None] = [None] * count
    for name, slots in windows.items():
        for slot in slots:
            owners[slot] = name
    found: dict[str, int] = {}
    for name in sorted(widths, key=lambda name: -widths[name]):
        width = widths[name]
        costs: list[tuple[int, int, int, int]] = []
        for first in range(count):
            others = {owners[slot] for slot in window(first, width, count)}
            ages = [age.get(other, -1) for other in others if other is not None]
            if -1 not in ages:
                at = -first if width == widest > 1 else first
                costs.append((max(ages, default=-1), len(ages), at, first))
        if not costs:
            return None
        *_, found[name] = min(costs)
        slots = window(found[name], width, count)
        gone = {owners[slot] for slot in slots}
        owners = [None if other in gone else other for other in owners]
        for slot in slots:
            owners[slot] = name
    return found
