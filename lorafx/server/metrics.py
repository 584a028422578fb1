"""What a server counts, as Prometheus reads it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from lorafx.serving.continuous.health import StepHealth
from lorafx.session.statistics import Statistics

#: The adapter of requests that ask for what there is not. Their own words would be labels without
#: end.
UNKNOWN = "__unknown__"
#: Fields of `Statistics` that are counted, and what is said of them.
COUNTED: Mapping[str, str] = {
    "hits": "Adapters of a batch that were in a slot already",
    "loads": "Adapters that were written into a slot",
    "evictions": "Adapters that lost their slot to another",
    "waits": "Requests that were ready for a step and had no slot in it",
}
#: Likewise of `Tier`.
COUNTED_OF_TIERS: Mapping[str, str] = {
    "hits": "Adapters that were asked for and found in a tier",
    "misses": "Adapters that were asked for and not in a tier",
    "evictions": "Adapters that had to leave a tier",
}
TIER_BYTES = "Bytes of adapters in a tier; of the device's banks"
TOKENS = "Tokens that have been run, prompts included"
FAILED_STEPS = "Steps of the engine that served nobody since the model failed"


class Metrics:
    """The counts of one server.

    Args:
        stats: gives the model's own counts, `CompiledModel.stats`.
        health: of the engine.
    """

    def __init__(self, stats: Callable[[], Statistics], health: StepHealth) -> None:
        self._registry = CollectorRegistry()
        self._requests = Counter(
            "lorafx_requests",
            "Requests that have ended, by adapter and status; 499: the client went away",
            ["adapter", "status"],
            registry=self._registry,
        )
        self._failures = Counter(
            "lorafx_failures",
            "Requests whose generation failed, also after the answer had begun",
            ["adapter"],
            registry=self._registry,
        )
        self._running = Gauge(
            "lorafx_requests_running",
            "Requests that are being answered",
            registry=self._registry,
        )
        self._registry.register(_Adapters(stats))
        self._registry.register(_Steps(health))

    def began(self) -> None:
        """A request has come."""
        self._running.inc()

    def ended(self, adapter: str, status: int) -> None:
        """A request has been answered, or given up."""
        self._running.dec()
        self._requests.labels(adapter, str(status)).inc()

    def failed(self, adapter: str) -> None:
        """The generation of a request has failed."""
        self._failures.labels(adapter).inc()

    def text(self) -> bytes:
        """All counts in Prometheus's format."""
        return generate_latest(self._registry)


class _Adapters:
    """The counts of `Statistics` at the moment at which they are read."""

    def __init__(self, stats: Callable[[], Statistics]) -> None:
        self._stats = stats

    def collect(self) -> Iterator[Metric]:
        stats = self._stats()
        for name, text in COUNTED.items():
            yield CounterMetricFamily(f"lorafx_adapter_{name}", text, value=getattr(stats, name))
        yield from _tiers(stats)
        tokens = CounterMetricFamily("lorafx_tokens", TOKENS, labels=["adapter"])
        for adapter, count in stats.tokens.items():
            tokens.add_metric([adapter], count)
        yield tokens


class _Steps:
    """The steps of the engine that have failed, at the moment at which they are read."""

    def __init__(self, health: StepHealth) -> None:
        self._health = health

    def collect(self) -> Iterator[Metric]:
        yield CounterMetricFamily("lorafx_failed_steps", FAILED_STEPS, value=self._health.failed)


def _tiers(stats: Statistics) -> Iterator[Metric]:
    """What lies where: on the device, in host memory, in files."""
    nbytes = GaugeMetricFamily("lorafx_tier_bytes", TIER_BYTES, labels=["tier"])
    for tier, of_tier in stats.tiers.items():
        nbytes.add_metric([tier], of_tier.nbytes)
    yield nbytes
    for name, text in COUNTED_OF_TIERS.items():
        counted = CounterMetricFamily(f"lorafx_tier_{name}", text, labels=["tier"])
        for tier, of_tier in stats.tiers.items():
            counted.add_metric([tier], getattr(of_tier, name))
        yield counted
