"""Windows of slots: an adapter of larger rank takes several slots in a row.

    width of an adapter   ⌈rank / slot rank⌉, the most of any bank     its window: that many slots

The last slot has room for the largest rank (lorafx.model.bank), so a window may reach past it.
Hence adapters fit wherever the widths of all but the widest sum up to less than the number of slots
and all windows may move (`fit`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence

from lorafx.model.bank import Factors
from lorafx.model.sites import Group


def width_of(groups: Sequence[Group], factors: Mapping[int, Iterable[Factors]]) -> int:
    """The slots in a row of an adapter with these factors by group."""
    widths = (groups[g].bank.width(f.rank) for g, of_group in factors.items() for f in of_group)
    return max(widths, default=1)


def window(first: int, width: int, count: int) -> range:
    """The slots, of `count`, of an adapter in slot `first`."""
    return range(first, min(first + width, count))


def fit(widths: Mapping[str, int], kept: Mapping[str, int], count: int, widest: int) -> bool:
    """Whether adapters of these widths find slots together, with those of `kept` in place; a fast
    form of `arranged` for each step of an engine."""
    most = max(widths.values(), default=0)
    if most > 1 and kept:
        return arranged(widths, kept, (), kept, count, widest) is not None
    return sum(widths.values()) - most < count


def arranged(
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
