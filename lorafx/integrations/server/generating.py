"""What transformers' handlers generate with: the engine, with the adapter of each request.

handler ── get_manager("base:adapter") ─▶ AdapterGeneration ─▶ AdapterBatchingManager
                                          one for each request   one for the server
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any
from uuid import uuid4

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream
from transformers import GenerationConfig
from transformers.cli.serving.utils import (
    CBGenerateManager,
    CBStreamer,
    CBWorkerDeadError,
    GenerationState,
    response_events_to_chunks,
)

from lorafx.adapter_store.names import BASE
from lorafx.generation.continuous.manager import AdapterBatchingManager
from lorafx.generation.continuous.sampling import RANGES
from lorafx.integrations.server.errors import RequestError
from lorafx.integrations.server.metrics import Metrics
from lorafx.integrations.server.served_model import ServedModel
from lorafx.torch_internals.transformers_parts import stream_error


class TextStreamer(CBStreamer):
    """Decodes the tokens of one request for `queue`, which ends with None.

    The pieces are together the decoded text of all tokens: what tokenizers' `DecodeStream` holds
    back at the end is said then, and a stream goes on behind bytes that are no text. `parser` is
    transformers' for the model's answers; None where they are plain text.
    """

    def __init__(
        self, engine: Any, request_id: str, tokenizer: Tokenizer, queue: asyncio.Queue, parser: Any
    ) -> None:
        loop = asyncio.get_running_loop()
        super().__init__(engine, request_id, tokenizer, loop, queue, response_parser=parser)
        self._ids: list[int] = []
        self._said = 0

    def put(self, output: Any) -> None:
        """Say what the tokens that have come since are."""
        for token in output.generated_tokens[self.total_tokens :]:
            self.total_tokens += 1
            self._ids.append(token)
            try:
                text = self._decode_stream.step(self._tokenizer, token) or ""
            except Exception:  # a bare one of tokenizers: the text before is another one now
                text = self._rest()
                self._decode_stream = DecodeStream(
                    self._ids, skip_special_tokens=self._parser is None
                )
            self._say(text)

    def end(self) -> None:
        """Say what was held back, and that there is no more."""
        self._say(self._rest())
        super().end()

    def _rest(self) -> str:
        """What has not been said of the tokens that have come."""
        whole = self._tokenizer.decode(self._ids, skip_special_tokens=self._parser is None)
        return whole[self._said :]

    def _say(self, text: str) -> None:
        if not text:
            return
        self._said += len(text)
        items = [text]
        if self._parser is not None:
            items = response_events_to_chunks(self._parser.feed(text))
        for item in items:
            self._queue.put_nowait(item)


class AdapterGeneration(CBGenerateManager):
    """Generates for one request with an adapter, None for the base; prompt and answer have at most
    `most_tokens` together. `failed` is called where the generation fails. What transformers calls
    of its engine is here too: the request goes to `engine` with its adapter, and its outputs come
    back here."""

    def __init__(
        self,
        engine: AdapterBatchingManager,
        adapter: str | None,
        most_tokens: int,
        failed: Callable[[], None],
    ) -> None:
        super().__init__()
        self._cb: Any = self
        self._engine, self._adapter = engine, adapter
        self._most_tokens = most_tokens
        self._failed = failed
        self._callback: Callable[[Any], None] | None = None
        self._sampling: dict[str, Any] = {}

    @property
    def background_thread_status(self) -> Any:
        return self._engine.background_thread_status

    def register_result_handler(self, request_id: str, callback: Callable[[Any], None]) -> None:
        self._callback = callback

    def add_request(
        self, input_ids: list[int], request_id: str, *, streaming: bool, **request: Any
    ) -> str:
        def deliver(output: Any) -> None:
            assert self._callback is not None
            if output.error is not None:
                self._failed()
                if streaming:
                    output = replace(output, error=_quotable(output.error))
            self._callback(output)

        self._engine.register_result_handler(request_id, deliver)
        given = {**request, **self._sampling, "adapter": self._adapter, "streaming": streaming}
        try:
            return self._engine.add_request(input_ids, request_id, **given)
        except BaseException:
            self._forget(request_id)
            raise

    def cancel_request(self, request_id: str) -> None:
        self._engine.cancel_request(request_id)
        self._forget(request_id)  # the engine says nothing more about it

    def _forget(self, request_id: str) -> None:
        router = self._engine.output_router
        with router._lock:
            router.result_handlers.pop(request_id, None)

    def generate_streaming(
        self,
        model: Any,
        processor: Any,
        inputs: dict[str, Any],
        gen_config: GenerationConfig,
        request_id: str,
        response_parser: Any = None,
    ) -> tuple[Any, Any]:
        """The queue of pieces of text, which are together what `generate_non_streaming` returns,
        and what fills it. Clients name their requests; the engine gets names of its own, since two
        that are alike would mix the answers."""
        self._prepare(inputs, gen_config)
        name = uuid4().hex
        self._check_alive(name)
        queue: asyncio.Queue[Any] = asyncio.Queue()
        streamer = TextStreamer(self, name, processor._tokenizer, queue, response_parser)

        def deliver(output: Any) -> None:
            try:
                streamer.put(output)
                if output.error is not None:
                    queue.put_nowait(stream_error(output.error))
                if output.error is not None or output.is_finished():
                    streamer.end()
            except Exception as error:  # of a parser, about this answer alone
                queue.put_nowait(stream_error(_quotable(str(error))))

        self.register_result_handler(name, deliver)
        self.add_request(
            inputs["input_ids"],
            request_id=name,
            streaming=True,
            max_new_tokens=gen_config.max_new_tokens,
            eos_token_id=gen_config.eos_token_id,
        )
        return queue, streamer

    async def generate_non_streaming(
        self,
        model: Any,
        processor: Any,
        inputs: dict[str, Any],
        gen_config: GenerationConfig,
        request_id: str,
    ) -> tuple[str, int, list[int]]:
        """As transformers', but that no spaces are cleaned up, which a stream could not do; see
        `generate_streaming` for the name."""
        self._prepare(inputs, gen_config)
        try:
            _, length, tokens = await super().generate_non_streaming(
                model, processor, inputs, gen_config, uuid4().hex
            )
        except CBWorkerDeadError:
            raise
        except RuntimeError as error:
            raise RequestError(str(error), status=500) from error
        return processor._tokenizer.decode(tokens, skip_special_tokens=True), length, tokens

    def stop(self) -> None:
        """Nothing: the engine is the server's. transformers' own would call itself here."""

    def _prepare(self, inputs: dict[str, Any], config: GenerationConfig) -> None:
        """Raise RequestError where the prompt is too long or empty; have the answer fit."""
        length = len(inputs["input_ids"])
        if not length:
            raise RequestError("the prompt has no tokens; write something", "prompt")
        if length >= self._most_tokens:
            raise RequestError(
                f"the prompt has {length} tokens, and prompt and answer together may have "
                f"{self._most_tokens}; shorten it",
                code="context_length_exceeded",
            )
        config.max_new_tokens = min(config.max_new_tokens, self._most_tokens - length)
        self._sampling = {name: getattr(config, name) for name in RANGES}


class Generation(GenerationState):
    """Gives each request of the server its manager. `engine` is warmed up."""

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
        """How tokens are chosen where a request does not say."""
        return self._engine.generation_config

    def use_continuous_batching(self, model: Any, modality: Any) -> bool:
        return True

    def get_manager(self, model_id: str, use_cb: bool = False) -> AdapterGeneration:
        """For a request that asks for this model."""
        adapter = self._served.adapter_of(model_id)
        label = BASE if adapter is None else adapter
        failed = self._metrics.failures.labels(label).inc
        return AdapterGeneration(self._engine, adapter, self._most_tokens, failed)


def _quotable(text: str) -> str:
    """What transformers may put between the quotes of a JSON string."""
    return json.dumps(text)[1:-1]
