"""The server's counts in Prometheus's format, under vLLM's names where they mean the same."""

from __future__ import annotations

import itertools
import time
from collections import Counter as Counts
from collections.abc import Callable, Iterator, Mapping
from typing import get_args

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from transformers.generation.continuous_batching.requests import RequestState

from lorafx.adapter_store.names import BASE, SUMS, Mixture
from lorafx.adapter_store.stored import Retired
from lorafx.compiled_model.compiled import CompiledModel
from lorafx.generation.continuous.adapter_requests import SequenceOutput, hold_of
from lorafx.generation.continuous.failures import StepHealth
from lorafx.generation.continuous.manager import AdapterBatchingManager
from lorafx.runtime.kinds import TierName
from lorafx.runtime.statistics import Statistics

#: The label of requests whose model is unknown. The names that clients send would be labels without
#: number.
UNKNOWN = "__unknown__"
#: The label that the adapters share which have none of their own, and how many have one.
OTHERS = "__others__"
MOST_LABELS = 256
#: Fields of `Statistics` that are exported as counters, with their descriptions.
_COUNTERS: Mapping[str, str] = {
    "hits": "Adapters of a batch that were in a slot already",
    "loads": "Adapters that were written into a slot",
    "evictions": "Adapters that lost their slot to another",
    "waits": "Requests that were ready for a step and had no slot in it",
}
#: Likewise fields of `PlaceCounts`.
_PLACE_COUNTERS: Mapping[str, str] = {
    "hits": "Adapters that were asked for and found in a place",
    "misses": "Adapters that were asked for and not in a place",
    "evictions": "Adapters that had to leave a place",
}
_SECONDS = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.15, 0.25, 0.5, 0.75),
    *(1, 2.5, 5, 10, 20, 40, 80, 160, 640, 2560),
)
_TOKENS = tuple(digit * 10**power for power in range(6) for digit in (1, 2, 5))
#: Histograms under vLLM's names: their bounds and descriptions.
_HISTOGRAMS: Mapping[str, tuple[tuple[float, ...], str]] = {
    "time_to_first_token_seconds": (_SECONDS, "From a request's arrival to its first token"),
    "inter_token_latency_seconds": (_SECONDS, "Between two tokens of a sequence"),
    "e2e_request_latency_seconds": (_SECONDS, "From a request's arrival to its answer's end"),
    "request_queue_time_seconds": (_SECONDS, "Before a sequence's first step"),
    "request_prefill_time_seconds": (_SECONDS, "From a sequence's first step to its first token"),
    "request_decode_time_seconds": (_SECONDS, "From a sequence's first token to its last"),
    "request_prompt_tokens": (_TOKENS, "Tokens of a request's prompts"),
    "request_generation_tokens": (_TOKENS, "Tokens that a request was answered with"),
}


class Labels:
    """The labels of adapters, of which there is a bounded number: the first `most` adapters have
    their own, the others share `OTHERS`."""

    def __init__(self, most: int = MOST_LABELS) -> None:
        self._names = {BASE, SUMS, UNKNOWN, OTHERS}
        self._most = most + len(self._names)

    def __call__(self, adapter: str) -> str:
        if isinstance(adapter, Mixture):
            return SUMS
        if adapter not in self._names:
            if len(self._names) >= self._most:
                return OTHERS
            self._names.add(adapter)
        return adapter


def families(
    stats: Statistics, health: StepHealth, label: Callable[[str], str]
) -> Iterator[Metric]:
    """The current metrics of a model and its engine. `label` gives adapters their labels."""
    for name, text in _COUNTERS.items():
        yield CounterMetricFamily(f"lorafx_adapter_{name}", text, value=getattr(stats, name))
    for name, text in _PLACE_COUNTERS.items():
        family = CounterMetricFamily(f"lorafx_place_{name}", text, labels=["place"])
        for place, counts in stats.places.items():
            family.add_metric([place], getattr(counts, name))
        yield family
    text = "Bytes of the device's banks, of adapters in host memory, and of their files on disk"
    sizes = GaugeMetricFamily("lorafx_adapter_bytes", text, labels=["place"])
    for place, nbytes in stats.nbytes.items():
        sizes.add_metric([place], nbytes)
    yield sizes
    text = "Tokens that have been run, prompts included"
    tokens = CounterMetricFamily("lorafx_tokens", text, labels=["adapter"])
    for adapter, number in _labelled(stats.tokens, label).items():
        tokens.add_metric([adapter], number)
    yield tokens
    text = "Steps of the engine that served nobody since the model failed"
    yield CounterMetricFamily("lorafx_failed_steps", text, value=health.failed)


def _labelled(numbers: Mapping[str, int], label: Callable[[str], str]) -> Mapping[str, int]:
    """The numbers of adapters by their labels."""
    sums: Counts[str] = Counts()
    for adapter, number in numbers.items():
        sums[label(adapter)] += number
    return sums


class Metrics:
    """The metrics of one server, whose base model is called `name`.

    Attributes:
        label: gives adapters their labels.
        requests: the number of requests that have ended, by adapter and status.
        failures: the number of sequences whose generation failed, by adapter.
        running: the number of requests that are being answered.
    """

    def __init__(self, compiled: CompiledModel, engine: AdapterBatchingManager, name: str) -> None:
        self._compiled, self._engine = compiled, engine
        self._registry = registry = CollectorRegistry()
        self.label = Labels()
        self.requests = Counter(
            "lorafx_requests",
            "Requests that have ended, by adapter and status; 499: the client went away",
            ["adapter", "status"],
            registry=registry,
        )
        self.failures = Counter(
            "lorafx_failures",
            "Sequences whose generation failed, also after the answer had begun",
            ["adapter"],
            registry=registry,
        )
        self.running = Gauge(
            "lorafx_requests_running", "Requests that are being answered", registry=registry
        )
        #: The labels of all of vLLM's metrics.
        self._of_vllm = labels = {"model_name": name, "engine": "0"}
        self._histograms = {
            name: Histogram(
                f"vllm:{name}", text, [*labels], buckets=bounds, registry=registry
            ).labels(**labels)
            for name, (bounds, text) in _HISTOGRAMS.items()
        }
        text = "Tokens of prompts, or that were generated, of requests that have ended"
        self._tokens = {
            name: Counter(f"vllm:{name}_tokens", text, [*labels], registry=registry).labels(
                **labels
            )
            for name in ("prompt", "generation")
        }
        self._success = Counter(
            "vllm:request_success",
            "Sequences that have ended, by the reason of their end",
            [*labels, "finished_reason"],
            registry=registry,
        )
        registry.register(self)

    def observe(self, name: str, value: float) -> None:
        """Add a value to one of vLLM's histograms."""
        self._histograms[name].observe(value)

    def sequence_ended(self, adapter: str, output: SequenceOutput) -> None:
        """Count a sequence by its last output."""
        if output.error is not None:
            self.failures.labels(self.label(adapter)).inc()
            return
        self._success.labels(**self._of_vllm, finished_reason=output.finish_reason).inc()
        begun, times = output.lifespan[0], output.timestamps or ()
        if begun < 0:  # it was aborted before its first step
            return
        self.observe("request_queue_time_seconds", begun - output.created_time)
        for before, after in itertools.pairwise(times):
            self.observe("inter_token_latency_seconds", after - before)
        if times:
            self.observe("request_prefill_time_seconds", times[0] - begun)
            self.observe("request_decode_time_seconds", times[-1] - times[0])

    def request_ended(
        self, adapter: str, status: int, seconds: float, tokens: Mapping[str, int]
    ) -> None:
        """Count a request that has been answered or abandoned. `tokens` has the numbers of those in
        its "prompt" and of its "generation"."""
        self.requests.labels(self.label(adapter), str(status)).inc()
        for name, number in tokens.items():
            self._tokens[name].inc(number)
        if status == 200:
            self.observe("e2e_request_latency_seconds", seconds)
            for name, number in tokens.items():
                self.observe(f"request_{name}_tokens", number)

    def collect(self) -> Iterator[Metric]:
        """The metrics of the model and its engine; called by the registry."""
        yield from families(self._compiled.stats(), self._engine.health, self.label)
        text = "Kinds of calls, by how the next call is answered"
        kinds = GaugeMetricFamily("lorafx_graphs", text, labels=["tier"])
        status = self._compiled.status()
        for tier in get_args(TierName):
            kinds.add_metric([tier], status.count(tier))
        yield kinds
        text = "1 for an adapter that is in this place: the device's banks, or host memory only"
        resident = GaugeMetricFamily("lorafx_adapter_place", text, labels=["adapter", "place"])
        places = self._engine.forwards.session.store.places()
        for adapter in sorted(places, key=lambda name: places[name])[:MOST_LABELS]:
            if places[adapter] != "disk":
                resident.add_metric([adapter, places[adapter]], 1)
        yield resident
        yield from self._sequences()

    def _sequences(self) -> Iterator[Metric]:
        """The sequences in the engine at present, and the share of its cache that they take."""
        text = "Sequences in the engine by adapter: running, or waiting for their first step"
        by_adapter = GaugeMetricFamily("lorafx_adapter_requests", text, labels=["adapter", "state"])
        # Gateways choose a server by these labels; the value is a time in vLLM, too.
        info = {"max_lora": str(self._engine.forwards.session.store.max_adapters)}
        for state, sequences in self._engine.sequences().items():
            found = Counts(map(_adapter_of, sequences))
            for adapter, number in _labelled(found, self.label).items():
                by_adapter.add_metric([adapter, state], number)
            names = sorted(name for name in found if name != BASE)[:MOST_LABELS]
            info[f"{state}_lora_adapters"] = ",".join(names)
            text = f"Sequences that are {state}"
            yield self._gauge(f"num_requests_{state}", text, len(sequences), self._of_vllm)
        yield by_adapter
        text = "Adapters of the sequences in the engine"
        yield self._gauge("lora_requests_info", text, time.time(), info)
        text = "The share of the cache of keys and values that running sequences take"
        yield self._gauge("kv_cache_usage_perc", text, self._engine.cache_usage(), self._of_vllm)

    @staticmethod
    def _gauge(name: str, text: str, value: float, labels: Mapping[str, str]) -> Metric:
        gauge = GaugeMetricFamily(f"vllm:{name}", text, labels=[*labels])
        gauge.add_metric([*labels.values()], value)
        return gauge

    def text(self) -> bytes:
        """All metrics in Prometheus's text format."""
        return generate_latest(self._registry)


def _adapter_of(state: RequestState) -> str:
    hold = hold_of(state)
    name = BASE if hold is None else hold.stored.name
    return name.replaced if isinstance(name, Retired) else name
