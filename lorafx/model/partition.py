"""Which slices of a packed module each of several names covers, by row counts alone.

    slices of S_0, S_1, …  rows;   names n_0, n_1, … in order, some of them with R_i rows
    n_i covers slices p_i … p_{i+1} − 1,   0 = p_0 < p_1 < … = the number of slices

The names partition the slices: each has one or more that follow one another, and none is left out.
"""

from __future__ import annotations

from collections.abc import Sequence


def spans(sizes: Sequence[int], rows: Sequence[int | None]) -> list[set[tuple[int, int]]]:
    """What each name may cover in some partition of the slices among all names.

    Args:
        sizes: positive rows of each slice.
        rows: rows of each name, None where they are not known.

    Returns:
        For each name (first slice, slice behind the last). All are empty where no partition has
        these rows; a name with several can't be placed by rows alone. Names with one span each
        have those of the one partition that they can have.
    """
    ends = [0]
    for size in sizes:
        ends.append(ends[-1] + size)

    def following(start: int, wanted: int | None) -> list[int]:
        later = range(start + 1, len(ends))
        return [end for end in later if wanted in (None, ends[end] - ends[start])]

    reached = [{0}]
    for wanted in rows:
        reached.append({end for start in reached[-1] for end in following(start, wanted)})
    kept = {len(sizes)} & reached[-1]
    found: list[set[tuple[int, int]]] = []
    for starts, wanted in zip(reversed(reached[:-1]), reversed(rows), strict=True):
        own = {(start, end) for start in starts for end in following(start, wanted) if end in kept}
        kept = {start for start, _ in own}
        found.append(own)
    return found[::-1]
