"""What adapters have done in a session, counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from lorafx.adapter_store.store import AdapterStore


@dataclass(frozen=True)
class Tier:
    """Counts of one place where adapters lie: how often one that was asked for was found there
    (`hits`) or not (`misses`), and how many had to go (`evictions`)."""

    hits: int
    misses: int
    evictions: int


@dataclass(frozen=True)
class Statistics:
    """Counts since the model was compiled.

    Attributes:
        hits: adapters of a batch that were in a slot already.
        loads: adapters that were written into a slot.
        evictions: adapters that lost their slot to another.
        waits: requests of continuous batching that were ready for a step and had no slot in it.
        tokens: tokens that continuous batching has run, prompts included, by adapter;
            "__base__" is the base model.
        nbytes: bytes of the banks ("banks"), of adapters in host memory ("host"), and of the files
            that they were read from ("disk"), now.
        tiers: "host", where adapters without a slot are looked for; "disk", from which those are
            read that host memory had no room for: its misses are files that had changed.
    """

    hits: int
    loads: int
    evictions: int
    waits: int
    tokens: Mapping[str, int] = field(default_factory=dict)
    nbytes: Mapping[str, int] = field(default_factory=dict)
    tiers: Mapping[str, Tier] = field(default_factory=dict)


@dataclass
class SessionCounts:
    """What a session counts by itself, in place: `waits` and `tokens` as in `Statistics`, and how
    often new base weights were written, or begun to be (`writes`), by updates of the session and of
    others that share them."""

    waits: int = 0
    tokens: Counter[str] = field(default_factory=Counter)
    writes: int = 0

    def with_those_of(self, store: AdapterStore) -> Statistics:
        """What adapters have done in a session with this store."""
        slots = store.hits, store.loads, store.evictions
        host = store.host
        tiers = {
            "host": Tier(host.hits, host.misses, host.evictions),
            "disk": Tier(host.misses - host.changed, host.changed, 0),
        }
        return Statistics(*slots, self.waits, dict(self.tokens), store.nbytes(), tiers)
