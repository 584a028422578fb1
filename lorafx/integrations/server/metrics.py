"""What a server counts, as Prometheus reads it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from lorafx.generation.continuous.failures import StepHealth
from lorafx.runtime.statistics import Statistics

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


class Count(NamedTuple):
    """One number of a model or its engine. It only grows, where it is no `size`."""

    name: str
    text: str
    value: int
    labels: Mapping[str, str] = {}
    size: bool = False


def counts(stats: Statistics, health: StepHealth) -> Iterator[Count]:
    """All numbers of a model and its engine, at this moment."""
    for name, text in _COUNTED.items():
        yield Count(f"lorafx_adapter_{name}", text, getattr(stats, name))
    for place, nbytes in stats.nbytes.items():
        text = "Bytes of the device's banks, and of adapters in host memory"
        yield Count("lorafx_adapter_bytes", text, nbytes, {"place": place}, size=True)
    for adapter, tokens in stats.tokens.items():
        text = "Tokens that have been run, prompts included"
        yield Count("lorafx_tokens", text, tokens, {"adapter": adapter})
    text = "Steps of the engine that served nobody since the model failed"
    yield Count("lorafx_failed_steps", text, health.failed)


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
        families: dict[str, Any] = {}
        for count in counts(self._stats(), self._health):
            if count.name not in families:
                kind = GaugeMetricFamily if count.size else CounterMetricFamily
                families[count.name] = kind(count.name, count.text, labels=list(count.labels))
            families[count.name].add_metric(list(count.labels.values()), count.value)
        yield from families.values()

    def text(self) -> bytes:
        """All counts in Prometheus's format."""
        return generate_latest(self._registry)
