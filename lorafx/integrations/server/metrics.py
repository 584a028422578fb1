"""What a server counts, as Prometheus reads it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from lorafx.generation.continuous.failures import StepHealth
from lorafx.runtime.session import Statistics

#: The adapter of requests that ask for what there is not: their own words would be labels without
#: end.
UNKNOWN = "__unknown__"
#: Fields of `Statistics` that are counted, and what is said of them.
_COUNTED: Mapping[str, str] = {
    "hits": "Adapters of a batch that were in a slot already",
    "loads": "Adapters that were written into a slot",
    "evictions": "Adapters that lost their slot to another",
    "waits": "Requests that were ready for a step and had no slot in it",
}
#: Likewise of `Tier`.
_COUNTED_OF_TIERS: Mapping[str, str] = {
    "hits": "Adapters that were asked for and found in a tier",
    "misses": "Adapters that were asked for and not in a tier",
    "evictions": "Adapters that had to leave a tier",
}


def families(stats: Statistics, health: StepHealth) -> Iterator[Metric]:
    """All numbers of a model and its engine, at this moment."""
    for name, text in _COUNTED.items():
        yield CounterMetricFamily(f"lorafx_adapter_{name}", text, value=getattr(stats, name))
    for name, text in _COUNTED_OF_TIERS.items():
        counted = CounterMetricFamily(f"lorafx_tier_{name}", text, labels=["tier"])
        for tier, counts in stats.tiers.items():
            counted.add_metric([tier], getattr(counts, name))
        yield counted
    text = "Bytes of the device's banks, of adapters in host memory, and of their files on disk"
    sizes = GaugeMetricFamily("lorafx_adapter_bytes", text, labels=["place"])
    for place, nbytes in stats.nbytes.items():
        sizes.add_metric([place], nbytes)
    yield sizes
    text = "Tokens that have been run, prompts included"
    tokens = CounterMetricFamily("lorafx_tokens", text, labels=["adapter"])
    for adapter, number in stats.tokens.items():
        tokens.add_metric([adapter], number)
    yield tokens
    text = "Steps of the engine that served nobody since the model failed"
    yield CounterMetricFamily("lorafx_failed_steps", text, value=health.failed)


class Metrics:
    """The counts of one server; `stats` is `CompiledModel.stats`.

    Attributes:
        requests: those that have ended, by adapter and status.
        failures: those whose generation failed, by adapter.
        running: those that are being answered.
    """

    def __init__(self, stats: Callable[[], Statistics], health: StepHealth) -> None:
        self._stats, self._health = stats, health
        self._registry = CollectorRegistry()
        self.requests = Counter(
            "lorafx_requests",
            "Requests that have ended, by adapter and status; 499: the client went away",
            ["adapter", "status"],
            registry=self._registry,
        )
        self.failures = Counter(
            "lorafx_failures",
            "Requests whose generation failed, also after the answer had begun",
            ["adapter"],
            registry=self._registry,
        )
        self.running = Gauge(
            "lorafx_requests_running",
            "Requests that are being answered",
            registry=self._registry,
        )
        self._registry.register(self)

    def ended(self, adapter: str, status: int) -> None:
        """A request has been answered, or given up."""
        self.running.dec()
        self.requests.labels(adapter, str(status)).inc()

    def collect(self) -> Iterator[Metric]:
        """The numbers of the model and its engine, as the registry asks for them."""
        return families(self._stats(), self._health)

    def text(self) -> bytes:
        """All counts in Prometheus's format."""
        return generate_latest(self._registry)
