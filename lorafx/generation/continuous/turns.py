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
from collections.abc import Collection, Iterable
from typing import NamedTuple

from lorafx.adapter_store.store import AdapterStore

#: Steps for which an adapter may be passed over before others make room for it, and before others
#: pause for it.
PATIENCE, LIMIT = 8, 128


class Asked(NamedTuple):
    """A request's adapter, by version and name in the store, and whether the cache has it."""

    version: int
    name: str
    begun: bool


class Turn(NamedTuple):
    """Versions of adapters that are not in the step, and of those in it without new requests."""

    passed_over: Collection[int] = ()
    closed: Collection[int] = ()

    def admits(self, request: Asked) -> bool:
        """Whether a request may be in the step."""
        closed = not request.begun and request.version in self.closed
        return request.version not in self.passed_over and not closed


class Turns:
    """The turns of one engine."""

    def __init__(self) -> None:
        #: Version of an adapter -> the number of steps for which it was passed over.
        self._waited: Counter[int] = Counter()

    def next(self, requests: Iterable[Asked], store: AdapterStore) -> Turn:
        """The turn of a step that these requests ask for, in the order of the queue."""
        slots, waited = store.max_adapters, self._waited
        names: dict[int, str] = {}
        begun: Counter[int] = Counter()  # requests in the cache
        for request in requests:
            names[request.version] = request.name
            begun[request.version] += request.begun
        if len(names) <= slots and store.fits(frozenset(names.values())):
            waited.clear()
            return Turn()
        resident = store.resident
        first = {version for version in names if begun[version]}
        may_pause = max(0, slots + max(1, slots // 4) - len(first))
        first.update([v for v in names if v not in first and waited[v] >= LIMIT][:may_pause])

        def order(version: int) -> tuple[bool, int, bool]:
            late = -waited[version] if waited[version] >= PATIENCE else 0
            return version not in first, late, names[version] not in resident

        chosen: dict[int, str] = {}
        for version in sorted(names, key=order):
            if len(chosen) == slots:
                break
            if store.fits(frozenset(chosen.values()) | {names[version]}):
                chosen[version] = names[version]
        passed_over = [version for version in names if version not in chosen]
        late = sum(waited[version] >= PATIENCE for version in passed_over)
        waited.update(passed_over)
        for version in chosen:
            del waited[version]
        ending = sorted((v for v in chosen if begun[v]), key=begun.__getitem__)
        return Turn(frozenset(passed_over), frozenset(ending[: min(late, max(1, slots // 2))]))
