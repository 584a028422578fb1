"""Counts of a session since its model was compiled."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from lorafx.adapter_store.store import AdapterStore


@dataclass(frozen=True)
class PlaceCounts:
    """Counts of one place of adapters: how often an adapter was looked up there and found (`hits`)
    or not (`misses`), and how many were removed for others (`evictions`)."""

    hits: int
    misses: int
    evictions: int


@dataclass(frozen=True)
class Statistics:
    """Counts since the model was compiled.

    Attributes:
        hits: adapters of a batch that were in a slot already.
        loads: adapters that were written into a slot.
        evictions: adapters that lost their slot to another one.
        waits: requests of continuous batching that were ready for a step and got no slot in it.
        tokens: tokens that continuous batching has run, prompts included, by adapter;
            "__base__" is the base model, "__sums__" all sums of adapters.
        nbytes: present bytes of the banks ("banks"), of adapters in host memory ("host"), and of
            the files that they were read from ("disk").
        places: "host", where adapters without a slot are looked up; "disk", from which adapters
            are read that host memory had no room for: its misses are files that have changed.
    """

    hits: int
    loads: int
    evictions: int
    waits: int
    tokens: Mapping[str, int] = field(default_factory=dict)
    nbytes: Mapping[str, int] = field(default_factory=dict)
    places: Mapping[str, PlaceCounts] = field(default_factory=dict)


@dataclass
class SessionCounts:
    """The session's own counters, updated in place: `waits` and `tokens` as in `Statistics`, and
    the updates that wrote its base weights, here or in a session that shares them."""

    waits: int = 0
    tokens: Counter[str] = field(default_factory=Counter)
    writes: int = 0

    def statistics(self, store: AdapterStore) -> Statistics:
        """These counts and those of the session's store."""
        slots = store.hits, store.loads, store.evictions
        host = store.host
        places = {
            "host": PlaceCounts(host.hits, host.misses, host.evictions),
            "disk": PlaceCounts(host.misses - host.changed, host.changed, 0),
        }
        return Statistics(*slots, self.waits, dict(self.tokens), store.nbytes(), places)
