"""Which slots adapters take, where one of a larger rank takes several in a row.

    width of an adapter   ⌈rank / slot rank⌉, the most of any bank     its window: that many slots

The last slot has room for the largest rank (lorafx.model.bank), so a window may reach past it. That
is why adapters fit wherever the widths of all but the widest sum up to less than the number of
slots and no window has to stay where it is (`fit`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence

from lorafx.model.bank import Factors
from lorafx.model.sites import Group


def width_of(groups: Sequence[Group], factors: Mapping[int, Iterable[Factors]]) -> int:
    """The slots that an adapter with these factors, by number of the group, takes in a row."""
    widths = (groups[g].bank.width(f.rank) for g, of_group in factors.items() for f in of_group)
    return max(widths, default=1)


def window(first: int, width: int, count: int) -> range:
    """Those of `count` slots that an adapter in slot `first` takes."""
    return range(first, min(first + width, count))


def fit(widths: Mapping[str, int], kept: Mapping[str, int], count: int, widest: int) -> bool:
    """Whether adapters of these widths find slots together, where those of `kept` stay in these.
    `arranged` would say the same more slowly, and an engine asks in each step."""
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
    """The first slot of each adapter that gets another one than it has, None where they do not
    fit.

    Args:
        widths: of every adapter.
        slots: the first slots of those that have some; the others get some.
        evictable: those that may lose theirs, least recently used first.
        kept: those of the others that have to stay where they are.
        count: slots.
        widest: the largest width that there can be, for which the last slot is kept if possible.

    Free slots go first, then those of adapters that were used least recently. Where that does not
    do, all of the evictable ones go, and the others that are not kept may move.
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
    """The first slot of each of these, the widest first, which evict none but `evictable`. Those of
    the width `widest` take the highest slots and others the lowest, so that what is left between
    them is in one piece."""
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
