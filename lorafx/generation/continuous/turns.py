"""Which adapters are in the next step, where more are asked for than have slots together.

    begun adapters, which have requests in the cache    stay until these have ended
    then those passed over for PATIENCE steps           the longest first
    then those in a slot, then the others               in the order of the queue

So an adapter keeps its slot while its requests run: a change costs a copy, and requests that pause
keep their part of the cache. Adapters for which requests keep coming would never end. As long as
others have been passed over for PATIENCE steps, so many of the begun adapters, those with the
fewest requests, take no new ones, at most half of the slots. An adapter that was passed over for
LIMIT steps has the slot of one whose requests then pause, unless as many as a quarter of the slots
pause already.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from lorafx.adapter_store.store import AdapterStore

#: Steps for which an adapter may be passed over before others make room for it, and before others
#: pause for it.
PATIENCE, LIMIT = 8, 128


@dataclass
class Demand:
    """An adapter's name in the store, and how many of its requests are in the cache."""

    name: str
    begun: int = 0


class Turn(NamedTuple):
    """Versions of adapters that are not in the step, and of those in it without new requests."""

    passed_over: Collection[int] = ()
    closed: Collection[int] = ()


class Turns:
    """The turns of one engine."""

    def __init__(self) -> None:
        #: Version of an adapter -> the number of steps for which it was passed over.
        self._waited: Counter[int] = Counter()

    def next(self, demand: Mapping[int, Demand], store: AdapterStore) -> Turn:
        """The turn of a step with this demand by version, in the order of the queue."""
        slots, waited = store.max_adapters, self._waited
        names = frozenset(item.name for item in demand.values())
        if len(names) <= slots and store.fits(names):
            waited.clear()
            return Turn()
        resident = store.resident
        first = {version for version, item in demand.items() if item.begun}
        may_pause = max(0, slots + max(1, slots // 4) - len(first))
        first.update([v for v in demand if v not in first and waited[v] >= LIMIT][:may_pause])

        def order(version: int) -> tuple[bool, int, bool]:
            late = -waited[version] if waited[version] >= PATIENCE else 0
            return version not in first, late, demand[version].name not in resident

        chosen: dict[int, str] = {}
        for version in sorted(demand, key=order):
            if len(chosen) == slots:
                break
            if store.fits(frozenset(chosen.values()) | {demand[version].name}):
                chosen[version] = demand[version].name
        passed_over = [version for version in demand if version not in chosen]
        late = sum(waited[version] >= PATIENCE for version in passed_over)
        waited.update(passed_over)
        for version in chosen:
            del waited[version]
        ending = sorted((v for v in chosen if demand[v].begun), key=lambda v: demand[v].begun)
        return Turn(frozenset(passed_over), frozenset(ending[: min(late, max(1, slots // 2))]))
