"""The served model with its engine, and the sequences of a request in it.

handler ── "base:adapter" ─▶ Sequences ─▶ AdapterBatchingManager
           fields            of a request  one for the server
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from functools import partial
from typing import Any
from uuid import uuid4

from transformers import PreTrainedTokenizerFast

from lorafx.adapter_store.names import BASE, Mixture, one_name
from lorafx.compiled_model.compiled import CompiledModel
from lorafx.errors import CapacityError, ConfigError, nearest
from lorafx.generation.continuous.adapter_requests import fork_names
from lorafx.generation.continuous.manager import AdapterBatchingManager
from lorafx.generation.continuous.parameters import ArgumentError, ends_of
from lorafx.integrations.server.admission import Queue
from lorafx.integrations.server.control import Control
from lorafx.integrations.server.errors import RequestError, message_of
from lorafx.integrations.server.fields import (
    SUM,
    Fields,
    GrammarSource,
    adapters_named,
    check_bounds,
    summands,
)
from lorafx.integrations.server.grammars import Grammars
from lorafx.integrations.server.loading import AdapterLoading
from lorafx.integrations.server.request_log import current_record
from lorafx.integrations.server.settings import ModelSettings
from lorafx.torch_internals.response_parser import response_template

#: With how many adapters an unknown name is compared, to name the nearest.
_COMPARED = 1000


class ServedModel:
    """The served model. A request names the base `name` or by one of `aliases`, and an adapter
    `name:adapter` or `adapter`, unless that is another's name. It may ask for the adapters that are
    loaded; if they are loaded `lazily`, by the caller of the application, for those that have a
    folder.

    Attributes:
        engine: an AdapterBatchingManager, or what else has the part of it that `Metrics` and
            `Control` use.
        loading: what loads adapters that requests name.
        queue: the places of sequences that are answered or wait.
        control: what pauses the engine and updates the base weights.
        most_tokens: how many a prompt and its answer may have together.
    """

    def __init__(
        self,
        compiled: CompiledModel,
        engine: Any,
        tokenizer: PreTrainedTokenizerFast,
        settings: ModelSettings,
        lazily: bool = False,
        limits: Sequence[int | None] = (),
    ) -> None:
        """`limits` are those of `most_tokens` that the model's configuration does not have."""
        self.compiled, self.engine, self.tokenizer = compiled, engine, tokenizer
        self.settings, self._lazily = settings, lazily
        self.name = settings.served_name
        self.loading, self.queue = AdapterLoading(compiled, settings), Queue(settings.max_queue)
        self.control = Control(compiled, engine, settings)
        self._created = int(time.time())
        model: Any = compiled._orig_mod
        self.text_config = model.config.get_text_config()
        positions = getattr(self.text_config, "max_position_embeddings", None)
        limits = (*limits, positions, settings.max_model_len)
        self.most_tokens = min(int(limit) for limit in limits if limit is not None)

    def adapters(self) -> Sequence[str]:
        """The adapters that requests may ask for."""
        return self.settings.folders() if self._lazily else self.compiled.adapters

    def _has(self, adapter: str) -> bool:
        if self._lazily:
            return self.settings.folder_of(adapter) is not None
        return adapter in self.compiled.adapters

    async def resolve(self, body: Mapping[str, Any]) -> str | None:
        """As `asked_for`, after the adapter was loaded if it is found only now."""
        check_bounds(body, self.settings)
        for name in (body.get("model"), *adapters_named(body).values(), *summands(body)):
            for adapter in self.settings.may_mean(name) if isinstance(name, str) else ():
                await self.loading.find(adapter)
        asked = self._asked_for(body)
        if isinstance(asked, Mixture):
            store = self.engine.forwards.session.store
            try:
                await asyncio.to_thread(store.__getitem__, asked)
            except (ConfigError, CapacityError) as error:
                raise RequestError(message_of(error), SUM) from error
        return asked

    def asked_for(self, body: Mapping[str, Any]) -> str | None:
        """The adapter that a request names by `model`, or beside the base by a field of other
        servers; None for the base model. Raises RequestError if it names none, or two, and what
        `check_bounds` raises."""
        check_bounds(body, self.settings)
        return self._asked_for(body)

    def _asked_for(self, body: Mapping[str, Any]) -> str | None:
        chosen = self.adapter_of(body.get("model"))
        for field, name in adapters_named(body).items():
            adapter = self._named_by(field, name)
            if chosen not in (None, adapter):
                raise RequestError(
                    f"`{field}` {name!r:.200} and {chosen!r} are two models for one request; send "
                    "one as `model`",
                    field,
                )
            chosen = adapter
        asked = summands(body)
        if not asked:
            return chosen
        scales = {self._named_by(SUM, name) or BASE: scale for name, scale in asked.items()}
        reason = ""
        if chosen is not None:
            reason = f"{chosen!r} is asked for, too"
        elif len(scales) < len(asked):
            reason = "an adapter is in it twice"
        elif self._lazily:
            reason = "a replica serves one adapter at a time"
        if reason:
            raise RequestError(f"`{SUM}` is a sum of adapters, and {reason}", SUM)
        try:
            return one_name(scales, f"`{SUM}`")
        except ConfigError as error:
            raise RequestError(str(error), SUM) from error

    def _named_by(self, field: str, name: str) -> str | None:
        """The adapter that a field beside `model` names; None for the base."""
        adapter = self._meant_by(name)
        if adapter is None and name not in self.settings.names:
            raise RequestError(
                f"`{field}` {name!r:.200} is no adapter of this server{self._nearest(name)}; "
                f"send one as `model`, such as {self.name}:ADAPTER. GET /v1/models lists all",
                field,
            )
        return adapter

    def _meant_by(self, name: str) -> str | None:
        return next((a for a in self.settings.may_mean(name) if self._has(a)), None)

    def adapter_of(self, model: object) -> str | None:
        """The adapter that a request's field `model` names; None for the base model. Raises
        RequestError if it names neither."""
        if not isinstance(model, str) or not model:
            raise RequestError(
                f"the field `model` chooses the adapter: {self.name!r} for the base model, "
                f'"{self.name}:ADAPTER" for an adapter; got {model!r:.80}',
                "model",
            )
        if model in self.settings.names:
            return None
        adapter = self._meant_by(model)
        if adapter is not None:
            return adapter
        raise RequestError(
            f"there is no model {model!r:.200}{self._nearest(model)}; the base model is "
            f'{self.name!r}, an adapter ADAPTER or "{self.name}:ADAPTER", and GET /v1/models lists '
            "all",
            "model",
            status=404,
            code="model_not_found",
        )

    def _nearest(self, model: str) -> str:
        """A fragment with names like `model`, which may lack the base's name or have another."""
        adapter = model.partition(":")[2] or model
        if self._has(adapter):
            return f"; nearest: {self.name}:{adapter}"
        adapters = self.adapters()[:_COMPARED]
        names = (*self.settings.names, *(f"{self.name}:{a}" for a in adapters), *adapters)
        return nearest(model, names) or nearest(adapter, adapters, prefix=f"{self.name}:")

    def listed(self) -> list[dict[str, Any]]:
        """The entries of /v1/models: all names of the base, and each adapter once."""
        adapters = (f"{self.name}:{adapter}" for adapter in self.adapters())
        return [self.entry(name) for name in (*self.settings.names, *adapters)]

    def entry(self, name: str) -> dict[str, Any]:
        """The entry of /v1/models for a name. Raises RequestError if no model has it."""
        adapter = self.adapter_of(name)
        folder = self.settings.model if adapter is None else self.settings.folder_of(adapter)
        return {
            **{"id": name, "object": "model", "created": self._created, "owned_by": "lorafx"},
            "root": str(folder or adapter),
            "parent": None if adapter is None else self.name,
            "max_model_len": self.most_tokens,
        }


class GeneratingModel(ServedModel):
    """A served language model.

    Attributes:
        processor: transformers' processor of images and sounds; None if the model takes text only.
        ends: the tokens that end a sequence.
    """

    def __init__(
        self,
        compiled: CompiledModel,
        engine: AdapterBatchingManager,
        tokenizer: PreTrainedTokenizerFast,
        settings: ModelSettings,
        lazily: bool = False,
        processor: Any = None,
    ) -> None:
        assert engine.batch_processor is not None
        cache = int(engine.batch_processor.cache.max_tokens_read)
        super().__init__(compiled, engine, tokenizer, settings, lazily, [cache])
        self.processor = processor
        self.ends = frozenset(ends_of(engine.generation_config.eos_token_id))
        #: By which the parts of an answer are found, if the model has one.
        self.template = response_template(tokenizer, compiled._orig_mod)
        self._grammars = Grammars(tokenizer, self.text_config.vocab_size, self.ends)

    async def arguments(self, fields: Fields, source: GrammarSource | None) -> dict[str, Any]:
        """The engine's arguments for a request. Raises RequestError if its grammar is invalid."""
        arguments = fields.arguments()
        if source is not None:  # a large one takes a second
            arguments["grammar"] = await asyncio.to_thread(self._grammars.compiled, source)
        return arguments


class Sequences:
    """The sequences of one HTTP request in the engine, with the present version of `adapter`, or
    the base if that is None, numbered in the order in which they were added. They are cancelled
    when the request ends before them."""

    def __init__(self, served: ServedModel, adapter: str | None) -> None:
        store = served.engine.forwards.session.store
        self._served, self._adapter = served, adapter and store.hold(adapter)
        self._count = 0
        self._running: set[str] = set()
        self._latest: dict[int, Any] = {}
        self._new = asyncio.Event()
        self._record = current_record()
        self._record.at_end.append(self.cancel)

    def add(self, prompt: list[int], most: int | None, *, n: int = 1, **arguments: Any) -> None:
        """Have the engine generate `n` sequences of at most `most` tokens, or of what fits. Raises
        RequestError if the prompt is too long or empty, or an argument is refused."""
        engine, room = self._served.engine, self._served.most_tokens - len(prompt)
        if not prompt:
            raise RequestError("the prompt has no tokens; write something", "prompt")
        if room < (0 if most == 0 else 1):
            raise RequestError(
                f"the prompt has {len(prompt)} tokens, and prompt and answer together may have "
                f"{self._served.most_tokens}; shorten it",
                code="context_length_exceeded",
            )
        first = uuid4().hex  # names that clients give need not be unique
        for name in (first, *fork_names(first, n - 1)):
            engine.register_result_handler(name, partial(self._put, self._count))
            self._running.add(name)
            self._count += 1
        most = room if most is None else min(most, room)
        try:
            engine.add_request(
                prompt, first, most, record_timestamps=True, adapter=self._adapter, n=n, **arguments
            )
        except ConfigError as error:
            field = error.argument if isinstance(error, ArgumentError) else None
            raise RequestError(message_of(error), field if field in arguments else None) from error
        self._record.prompt_tokens += len(prompt)

    async def outputs(self) -> AsyncIterator[tuple[int, Any]]:
        """The outputs until all sequences have ended, each with its sequence's number. An output is
        left out if a later one of its sequence has come meanwhile. Raises RequestError if the
        generation of one failed."""
        while self._latest or self._running:
            await self._new.wait()
            self._new.clear()
            latest, self._latest = self._latest, {}
            for index, output in sorted(latest.items()):
                if output.error is not None:
                    ended = self._served.engine.background_thread_status.fatal_error
                    status = 400 if output.refused else 500 if ended is None else 503
                    raise RequestError(f"the generation failed: {output.error}", status=status)
                yield index, output

    def cancel(self) -> None:
        """Cancel what is running."""
        engine, router = self._served.engine, self._served.engine.output_router
        for name in self._running:
            engine.cancel_request(name)
            with router._lock:
                router.result_handlers.pop(name, None)
        self._running.clear()

    def _put(self, index: int, output: Any) -> None:
        self._record.delivered(output)
        if output.is_finished():
            self._running.discard(output.request_id)
        self._latest[index] = output
        self._new.set()
