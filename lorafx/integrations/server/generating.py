"""The objects through which transformers' handlers generate, which give each request its adapter;
and the server's counts, in Prometheus's format.

handler ── get_manager("base:adapter") ─▶ AdapterGeneration ─▶ AdapterBatchingManager
                                          one for each request   one for the server
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, get_args
from uuid import uuid4

from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream
from transformers import GenerationConfig, PreTrainedTokenizerFast
from transformers.cli.serving.model_manager import ModelManager
from transformers.cli.serving.utils import (
    BaseGenerateManager,
    CBStreamer,
    CBWorkerDeadError,
    GenerationState,
    response_events_to_chunks,
)

from lorafx.adapter_store.names import BASE
from lorafx.compiled_model.compiled import CompiledModel
from lorafx.errors import nearest
from lorafx.generation.continuous.failures import StepHealth
from lorafx.generation.continuous.manager import AdapterBatchingManager
from lorafx.generation.continuous.sampling import RANGES
from lorafx.integrations.server.errors import RequestError
from lorafx.integrations.server.settings import ModelSettings
from lorafx.runtime.session import Statistics
from lorafx.runtime.tiers import TierName
from lorafx.torch_internals.transformers_parts import stream_error

#: The label of requests whose model is unknown. The names that clients send would be labels without
#: number.
UNKNOWN = "__unknown__"
#: Fields of `Statistics` that are exported as counters, with their descriptions.
_COUNTERS: Mapping[str, str] = {
    "hits": "Adapters of a batch that were in a slot already",
    "loads": "Adapters that were written into a slot",
    "evictions": "Adapters that lost their slot to another",
    "waits": "Requests that were ready for a step and had no slot in it",
}
#: Likewise fields of `Tier`.
_TIER_COUNTERS: Mapping[str, str] = {
    "hits": "Adapters that were asked for and found in a tier",
    "misses": "Adapters that were asked for and not in a tier",
    "evictions": "Adapters that had to leave a tier",
}


def families(stats: Statistics, health: StepHealth) -> Iterator[Metric]:
    """The current metrics of a model and its engine."""
    for name, text in _COUNTERS.items():
        yield CounterMetricFamily(f"lorafx_adapter_{name}", text, value=getattr(stats, name))
    for name, text in _TIER_COUNTERS.items():
        family = CounterMetricFamily(f"lorafx_tier_{name}", text, labels=["tier"])
        for tier, counts in stats.tiers.items():
            family.add_metric([tier], getattr(counts, name))
        yield family
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
    """The metrics of one server.

    Attributes:
        requests: the number of requests that have ended, by adapter and status.
        failures: the number of requests whose generation failed, by adapter.
        running: the number of requests that are being answered.
    """

    def __init__(self, compiled: CompiledModel, health: StepHealth) -> None:
        self._compiled, self._health = compiled, health
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
        """Count a request that has been answered or abandoned."""
        self.running.dec()
        self.requests.labels(adapter, str(status)).inc()

    def collect(self) -> Iterator[Metric]:
        """The metrics of the model and its engine; called by the registry."""
        yield from families(self._compiled.stats(), self._health)
        text = "Kinds of calls, by how the next call is answered"
        kinds = GaugeMetricFamily("lorafx_graphs", text, labels=["tier"])
        status = self._compiled.status()
        for tier in get_args(TierName):
            kinds.add_metric([tier], status.count(tier))
        yield kinds

    def text(self) -> bytes:
        """All metrics in Prometheus's text format."""
        return generate_latest(self._registry)


class ServedModel(ModelManager):
    """The manager of models of transformers' server, which here has one model that is never
    unloaded. A request names the base `name`, and an adapter `name:adapter`. It may ask for the
    adapters that have a folder according to `folders`, which its replica loads then; if that is
    None, for those that are loaded."""

    def __init__(
        self,
        compiled: CompiledModel,
        tokenizer: PreTrainedTokenizerFast,
        name: str,
        folders: ModelSettings | None = None,
    ) -> None:
        super().__init__()
        self.get_gen_models: Any = self.listed  # a static method there
        self.compiled = compiled
        self.tokenizer = tokenizer
        self.name = name
        self._folders = folders
        self._created = int(time.time())

    def adapters(self) -> Sequence[str]:
        """The adapters that requests may ask for."""
        return self.compiled.adapters if self._folders is None else self._folders.folders()

    def _has(self, adapter: str) -> bool:
        if self._folders is None:
            return adapter in self.compiled.adapters
        return self._folders.folder_of(adapter) is not None

    def adapter_of(self, model: object) -> str | None:
        """The adapter that a request's field `model` names; None for the base model. Raises
        RequestError if it names neither."""
        if not isinstance(model, str) or not model:
            raise RequestError(
                f"the field `model` chooses the adapter: {self.name!r} for the base model, "
                f'"{self.name}:ADAPTER" for an adapter; got {model!r}',
                "model",
            )
        if model == self.name:
            return None
        adapter = model.removeprefix(f"{self.name}:")
        if adapter != model and self._has(adapter):
            return adapter
        raise RequestError(
            f"there is no model {model!r}{self._nearest(model)}; the base model is "
            f'{self.name!r}, an adapter "{self.name}:ADAPTER", and GET /v1/models lists all',
            "model",
            status=404,
            code="model_not_found",
        )

    def _nearest(self, model: str) -> str:
        """A fragment with names like `model`, which may lack the base's name or have another."""
        adapter = model if self._has(model) else model.partition(":")[2] or model
        if self._has(adapter):
            return f"; nearest: {self.name}:{adapter}"
        names = [entry["id"] for entry in self.listed()]
        return nearest(model, names) or nearest(adapter, self.adapters(), prefix=f"{self.name}:")

    def listed(self) -> list[dict[str, Any]]:
        """The entries of /v1/models."""
        entry = {"object": "model", "created": self._created, "owned_by": "lorafx"}
        return [
            {"id": self.name, **entry, "parent": None},
            *({"id": f"{self.name}:{a}", **entry, "parent": self.name} for a in self.adapters()),
        ]


class TextStreamer(CBStreamer):
    """Decodes the tokens of one request and puts pieces of text into `queue`, at the end None.

    Together the pieces are the decoded text of all tokens: `end` sends what tokenizers'
    `DecodeStream` still holds back, and bytes that are no text do not end a stream. `parser` is
    transformers' parser of the model's answers; None if they are plain text.
    """

    def __init__(
        self, engine: Any, request_id: str, tokenizer: Tokenizer, queue: asyncio.Queue, parser: Any
    ) -> None:
        loop = asyncio.get_running_loop()
        super().__init__(engine, request_id, tokenizer, loop, queue, response_parser=parser)
        self._ids: list[int] = []
        self._sent = 0

    def put(self, output: Any) -> None:
        """Send the text of the tokens that are new in `output`."""
        for token in output.generated_tokens[self.total_tokens :]:
            self.total_tokens += 1
            self._ids.append(token)
            try:
                text = self._decode_stream.step(self._tokenizer, token) or ""
            except Exception:  # tokenizers raises this class when earlier text has changed
                text = self._unsent_text()
                self._decode_stream = DecodeStream(
                    self._ids, skip_special_tokens=self._parser is None
                )
            self._send(text)

    def end(self) -> None:
        """Send the text that was held back, and the end of the stream."""
        self._send(self._unsent_text())
        super().end()

    def _unsent_text(self) -> str:
        text = self._tokenizer.decode(self._ids, skip_special_tokens=self._parser is None)
        return text[self._sent :]

    def _send(self, text: str) -> None:
        if not text:
            return
        self._sent += len(text)
        items = [text]
        if self._parser is not None:
            items = response_events_to_chunks(self._parser.feed(text))
        for item in items:
            self._queue.put_nowait(item)


class AdapterGeneration(BaseGenerateManager):
    """Generates for one request with `adapter`, or with the base if that is None. Prompt and answer
    together have at most `most_tokens`. If the generation fails, `failed` is called."""

    def __init__(
        self,
        engine: AdapterBatchingManager,
        adapter: str | None,
        most_tokens: int,
        failed: Callable[[], None],
    ) -> None:
        self._engine, self._adapter = engine, adapter
        self._most_tokens, self._failed = most_tokens, failed

    def generate_streaming(
        self,
        model: Any,
        processor: Any,
        inputs: dict[str, Any],
        gen_config: GenerationConfig,
        request_id: str,
        response_parser: Any = None,
    ) -> tuple[Any, Any]:
        """The queue of pieces of text, and the streamer that fills it. Together the pieces are the
        text that `generate_non_streaming` returns. `request_id` is the client's, so it may not be
        unique; the engine gets another name, or two answers could be mixed."""
        name, queue = uuid4().hex, asyncio.Queue[Any]()
        streamer = TextStreamer(self, name, processor._tokenizer, queue, response_parser)

        def deliver(output: Any) -> None:
            try:
                streamer.put(output)
                if output.error is not None:
                    queue.put_nowait(stream_error(_json_escaped(output.error)))
                if output.error is not None or output.is_finished():
                    streamer.end()
            except Exception as error:  # of a parser: only this answer fails
                queue.put_nowait(stream_error(_json_escaped(str(error))))

        self._request(name, inputs["input_ids"], gen_config, deliver, streaming=True)
        return queue, streamer

    async def generate_non_streaming(
        self,
        model: Any,
        processor: Any,
        inputs: dict[str, Any],
        gen_config: GenerationConfig,
        request_id: str,
    ) -> tuple[str, int, list[int]]:
        """The text, the length of the prompt, and the tokens. Spaces are not cleaned up, since a
        stream cannot do so."""
        prompt, answer = inputs["input_ids"], asyncio.get_running_loop().create_future()

        def deliver(output: Any) -> None:
            if not answer.done():
                answer.set_result(output)

        self._request(uuid4().hex, prompt, gen_config, deliver, streaming=False)
        output = await answer
        if output.error is not None:
            self._refuse_dead()
            raise RequestError(f"the generation failed: {output.error}", status=500)
        tokens = output.generated_tokens
        return processor._tokenizer.decode(tokens, skip_special_tokens=True), len(prompt), tokens

    def stop(self) -> None:
        """Do nothing: the engine belongs to the server."""

    def cancel_request(self, name: str) -> None:
        """Cancel a request of the engine; the streamer calls this when its client disconnects."""
        self._engine.cancel_request(name)
        self._remove_handler(name)  # no more outputs will come

    def _request(
        self,
        name: str,
        prompt: list[int],
        config: GenerationConfig,
        deliver: Callable[[Any], None],
        *,
        streaming: bool,
    ) -> None:
        """Have the engine generate, and call `deliver` with its outputs. The length of the answer
        is limited to what fits. Raises RequestError if the prompt is too long or empty."""
        self._refuse_dead()
        if not prompt:
            raise RequestError("the prompt has no tokens; write something", "prompt")
        if len(prompt) >= self._most_tokens:
            raise RequestError(
                f"the prompt has {len(prompt)} tokens, and prompt and answer together may have "
                f"{self._most_tokens}; shorten it",
                code="context_length_exceeded",
            )
        # transformers' handlers compare this with the length of the answer for `finish_reason`.
        config.max_new_tokens = min(config.max_new_tokens, self._most_tokens - len(prompt))

        def count_and_deliver(output: Any) -> None:
            if output.error is not None:
                self._failed()
            deliver(output)

        self._engine.register_result_handler(name, count_and_deliver)
        try:
            self._engine.add_request(
                prompt,
                name,
                adapter=self._adapter,
                streaming=streaming,
                max_new_tokens=config.max_new_tokens,
                eos_token_id=config.eos_token_id,
                **{field: getattr(config, field) for field in RANGES},
            )
        except BaseException:
            self._remove_handler(name)
            raise

    def _refuse_dead(self) -> None:
        error = self._engine.background_thread_status.fatal_error
        if error is not None:
            raise CBWorkerDeadError(f"the engine has failed: {error}")

    def _remove_handler(self, name: str) -> None:
        router = self._engine.output_router
        with router._lock:
            router.result_handlers.pop(name, None)


class Generation(GenerationState):
    """Gives each request of the server its `AdapterGeneration`."""

    def __init__(
        self, served: ServedModel, engine: AdapterBatchingManager, metrics: Metrics
    ) -> None:
        super().__init__(continuous_batching=True)
        self._served = served
        self._engine = engine
        self._metrics = metrics
        model: Any = served.compiled.model
        assert engine.batch_processor is not None
        cache = int(engine.batch_processor.cache.max_tokens_read)
        positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        self._most_tokens = cache if positions is None else min(cache, int(positions))

    @property
    def config(self) -> GenerationConfig:
        """The defaults of requests."""
        return self._engine.generation_config

    def use_continuous_batching(self, model: Any, modality: Any) -> bool:
        return True

    def get_manager(self, model_id: str, use_cb: bool = False) -> AdapterGeneration:
        """The manager of a request whose field `model` is `model_id`."""
        adapter = self._served.adapter_of(model_id)
        label = BASE if adapter is None else adapter
        failed = self._metrics.failures.labels(label).inc
        return AdapterGeneration(self._engine, adapter, self._most_tokens, failed)


def _json_escaped(text: str) -> str:
    """The text as transformers may put it between the quotes of a JSON string."""
    return json.dumps(text)[1:-1]
