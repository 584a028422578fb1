"""The slots of adapters: which ones each takes, in a row where its rank is larger than a slot's."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence

from lorafx.errors import CapacityError


def too_many(widths: Mapping[str, int], slots: int, *, in_waves: bool) -> CapacityError:
    """The error for a batch whose adapters, of these widths, take more slots than there are.
    `in_waves`: whether its rows may be served in turn."""
    waves = ' or Options(overflow="waves")' if in_waves else ""
    if len(widths) > slots:
        turns = ", which serves requests in turn where each finds slots beside pinned adapters"
        return CapacityError(
            f"the batch has {len(widths)} distinct adapters ({', '.join(widths)}), but "
            f"there are only {slots} slots; split the batch, or compile "
            f"with LoraConfig(max_adapters={len(widths)}){waves}{turns if waves else ''}"
        )
    needed = sum(widths.values()) - max(widths.values()) + 1
    shown = ", ".join(f"{name} {width}" for name, width in widths.items())
    return CapacityError(
        f"the adapters of the batch take {needed} slots by their ranks ({shown}; one of them may "
        f"reach past the last slot), but there are only {slots}; split the batch, or compile with "
        f"LoraConfig(max_adapters={needed}) or a larger slot_rank{waves}"
    )


def no_slots(missing: Mapping[str, int], kept: Iterable[str], slots: int) -> CapacityError:
    """The error for `missing` adapters, of these widths, while the other slots are `kept`."""
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


def window(first: int, width: int, count: int) -> range:
    """The slots, of `count` in all, of an adapter whose first slot is `first`."""
    return range(first, min(first + width, count))


def arrange(
    widths: Mapping[str, int],
    slots: Mapping[str, int],
    evictable: Sequence[str],
    fixed: Collection[str],
    count: int,
    widest: int,
) -> dict[str, int] | None:
    """The first slot of each adapter that has to be written, or None if they do not fit.

    The last slot has room for the largest rank (lorafx.model.bank), so a window may extend past it.
    Hence adapters fit if all windows may move, and the widths of all but the widest add up to less
    than the number of slots.

    `slots` are the current first slots. If too few are free, the `evictable` lose theirs, least
    recently used first; the `fixed` stay. If that is not enough, all evictable ones are evicted and
    others may move. If possible, the last slot is left for an adapter of the `widest` width.
    """
    windows = {name: window(first, widths[name], count) for name, first in slots.items()}
    missing = {name: width for name, width in widths.items() if name not in slots}
    placed = _place_windows(missing, windows, evictable, count, widest)
    if placed is not None:
        return placed
    moving = {n: width for n, width in widths.items() if n not in evictable and n not in fixed}
    staying = {name: windows[name] for name in fixed}
    return _place_windows(moving, staying, (), count, max(moving.values()))


def _place_windows(
    widths: Mapping[str, int],
    windows: Mapping[str, range],
    evictable: Sequence[str],
    count: int,
    widest: int,
) -> dict[str, int] | None:
    """First slots, assigned to the widest adapters first, evicting only `evictable`. Adapters of
    width `widest` get the highest slots, others the lowest, so that free slots stay contiguous."""
    age = {name: number for number, name in enumerate(evictable)}
    owners: list[str | None] = [None] * count
    for name, slots in windows.items():
        for slot in slots:
            owners[slot] = name
    placed: dict[str, int] = {}
    for name in sorted(widths, key=lambda name: -widths[name]):
        width = widths[name]
        costs: list[tuple[int, int, int, int]] = []
        for first in range(count):
            occupants = {owners[slot] for slot in window(first, width, count)}
            ages = [age.get(name, -1) for name in occupants if name is not None]
            if -1 not in ages:
                preference = -first if width == widest > 1 else first
                costs.append((max(ages, default=-1), len(ages), preference, first))
        if not costs:
            return None
        *_, placed[name] = min(costs)
        slots = window(placed[name], width, count)
        evicted = {owners[slot] for slot in slots}
        owners = [None if owner in evicted else owner for owner in owners]
        for slot in slots:
            owners[slot] = name
    return placed
