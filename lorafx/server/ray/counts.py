"""What the engine of a replica counts, exported by Ray with the names of deployment and replica."""

from __future__ import annotations

from collections.abc import Callable

from ray.serve.metrics import Counter

from lorafx.serving.continuous.health import StepHealth
from lorafx.session.statistics import Statistics

#: field of `Statistics` -> what is said of it
_TEXTS = {
    "hits": "Adapters of a batch that were in a slot already",
    "loads": "Adapters that were written into a slot",
    "evictions": "Adapters that lost their slot to another",
    "waits": "Requests that were ready for a step and had no slot in it",
}


class Counts:
    """The counts of one replica; made in its process.

    Args:
        stats: gives the model's own counts, `CompiledModel.stats`.
        health: of the engine.
    """

    def __init__(self, stats: Callable[[], Statistics], health: StepHealth) -> None:
        self._health = health
        self._stats = stats
        self._said = Statistics(0, 0, 0, 0)
        self._counters = {
            name: Counter(f"lorafx_adapter_{name}", text) for name, text in _TEXTS.items()
        }
        self._tokens = Counter(
            "lorafx_tokens", "Tokens that have been run, prompts included", tag_keys=("adapter",)
        )
        self._failed = Counter(
            "lorafx_failed_steps", "Steps of the engine that served nobody since the model failed"
        )
        self._said_failed = 0

    def export(self) -> None:
        """Tell Ray what has been counted since it was told last."""
        stats, said = self._stats(), self._said
        self._said = stats
        for name, counter in self._counters.items():
            if more := getattr(stats, name) - getattr(said, name):
                counter.inc(more)
        for adapter, tokens in stats.tokens.items():
            if more := tokens - said.tokens.get(adapter, 0):
                self._tokens.inc(more, {"adapter": adapter})
        failed = self._health.failed
        if more := failed - self._said_failed:
            self._failed.inc(more)
        self._said_failed = failed
