"""What the engine of a replica counts, exported by Ray with the names of deployment and replica."""

from __future__ import annotations

from collections.abc import Callable

from ray.serve.metrics import Counter, Gauge

from lorafx.server.metrics import COUNTED, COUNTED_OF_TIERS, FAILED_STEPS, TIER_BYTES, TOKENS
from lorafx.serving.continuous.health import StepHealth
from lorafx.session.statistics import Statistics


class Counts:
    """The counts of one replica; made in its process.

    Args:
        stats: gives the model's own counts, `CompiledModel.stats`.
        health: of the engine.
    """

    def __init__(self, stats: Callable[[], Statistics], health: StepHealth) -> None:
        self._stats = stats
        self._health = health
        self._adapters = {
            name: Counter(f"lorafx_adapter_{name}", text) for name, text in COUNTED.items()
        }
        self._tiers = {
            name: Counter(f"lorafx_tier_{name}", text, tag_keys=("tier",))
            for name, text in COUNTED_OF_TIERS.items()
        }
        self._nbytes = Gauge("lorafx_tier_bytes", TIER_BYTES, tag_keys=("tier",))
        self._tokens = Counter("lorafx_tokens", TOKENS, tag_keys=("adapter",))
        self._failed = Counter("lorafx_failed_steps", FAILED_STEPS)
        #: (counter, what it is of) -> what Ray has been told
        self._told: dict[tuple[Counter, str], int] = {}

    def export(self) -> None:
        """Tell Ray what has been counted since it was told last, and how large the tiers are."""
        stats = self._stats()
        for name, counter in self._adapters.items():
            self._tell(counter, getattr(stats, name))
        for tier, of_tier in stats.tiers.items():
            self._nbytes.set(of_tier.nbytes, {"tier": tier})
            for name, counter in self._tiers.items():
                self._tell(counter, getattr(of_tier, name), "tier", tier)
        for adapter, tokens in stats.tokens.items():
            self._tell(self._tokens, tokens, "adapter", adapter)
        self._tell(self._failed, self._health.failed)

    def _tell(self, counter: Counter, count: int, tag: str = "", value: str = "") -> None:
        """Have `counter` be `count`, of what `tag` says."""
        more = count - self._told.get((counter, value), 0)
        if more:
            counter.inc(more, {tag: value} if tag else {})
            self._told[counter, value] = count
