"""What adapters have done in a session, counted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Statistics:
    """Counts since the model was compiled.

    Attributes:
        hits: adapters of a batch that were in a slot already. A batch of the same adapters as the
            one before it does not count.
        loads: adapters that were written into a slot.
        evictions: adapters that lost their slot to another.
        waits: requests of continuous batching that were ready for a step and had no slot in it.
        tokens: tokens that continuous batching has run, prompts included, by adapter;
            "__base__" is the base model.
    """

    hits: int
    loads: int
    evictions: int
    waits: int
    tokens: Mapping[str, int] = field(default_factory=dict)
