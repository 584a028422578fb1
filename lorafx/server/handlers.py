"""transformers' handlers of requests, which choose an adapter and refuse what is not served."""

from __future__ import annotations

import inspect
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import aclosing
from typing import Any

from fastapi.responses import JSONResponse, StreamingResponse
from jinja2 import TemplateError
from transformers import GenerationConfig
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.completion import CompletionHandler
from transformers.cli.serving.response import ResponseHandler
from transformers.cli.serving.utils import BaseHandler, Modality

from lorafx.adapter_store.names import BASE
from lorafx.server.errors import RequestError, status_of
from lorafx.server.generating import Generation
from lorafx.server.metrics import UNKNOWN, Metrics
from lorafx.server.served_model import ServedModel

#: Fields that would change the answer if they were honoured, with the values that ask for nothing.
#: transformers' server ignores them, or honours them only without continuous batching.
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "audio": (),
    "background": (False,),
    "best_of": (1,),
    "conversation": (),
    "echo": (False,),
    "frequency_penalty": (0,),
    "function_call": ("auto",),
    "functions": ([],),
    "generation_config": (),
    "logit_bias": ({},),
    "logprobs": (False,),
    "modalities": (["text"],),
    "n": (1,),
    "presence_penalty": (0,),
    "previous_response_id": (),
    "response_format": ({"type": "text"},),
    "stop": ([], ""),
    "text": ({}, {"format": {"type": "text"}}),
    "tool_choice": ("auto",),
    "top_logprobs": (0,),
    "truncation": ("disabled",),
}
LENGTHS = ("max_tokens", "max_completion_tokens", "max_output_tokens")
TEXT_PARTS = ("text", "input_text", "output_text")


class AdapterHandler(BaseHandler):
    """Mixed into transformers' handlers.

    Args:
        served: the model.
        generation: gives requests their managers.
        metrics: count requests.
    """

    #: The field that holds the prompt, and whether it goes through the chat template.
    prompt = "messages"
    chat = True

    def __init__(self, served: ServedModel, generation: Generation, metrics: Metrics) -> None:
        super().__init__(served, generation)
        self._served = served
        self._generation = generation
        self._metrics = metrics

    async def handle_request(self, body: dict[str, Any], request_id: str) -> Any:
        """Answer a request.

        Raises:
            RequestError: it is refused.
        """
        label = UNKNOWN
        self._metrics.began()
        try:
            adapter = self._served.adapter_of(body.get("model"))
            label = BASE if adapter is None else adapter
            self._check(body)
            try:
                handler: Any = super()
                response: StreamingResponse | JSONResponse
                response = await handler.handle_request(body, request_id)
            except TemplateError as error:
                raise RequestError(
                    400, f"the chat template refuses the messages: {error}", param=self.prompt
                ) from error
        except BaseException as error:
            self._metrics.ended(label, status_of(error))
            raise
        if isinstance(response, StreamingResponse):
            response.body_iterator = self._counted(response.body_iterator, label)
        else:
            self._metrics.ended(label, response.status_code)
        return response

    async def _counted(self, chunks: Any, label: str) -> AsyncIterator[Any]:
        status = 499
        try:
            async with aclosing(chunks):  # it cancels the request where it is left
                async for chunk in chunks:
                    yield chunk
            status = 200
        finally:
            self._metrics.ended(label, status)

    def _resolve_model(self, body: dict[str, Any]) -> tuple[str, Any, Any]:
        return body["model"], self._served.compiled.model, self._served.tokenizer

    def _build_generation_config(
        self, body: dict[str, Any], model_generation_config: GenerationConfig, use_cb: bool = False
    ) -> GenerationConfig:
        """Of the request; where it does not say, the server's."""
        return super()._build_generation_config(body, self._generation.config, use_cb=use_cb)

    def _check(self, body: dict[str, Any]) -> None:
        """Raise RequestError for what would not be honoured, or would fail further on."""
        for field, values in NEUTRAL.items():
            value = body.get(field)
            if value is not None and value not in values:
                raise RequestError(
                    400,
                    f"`{field}` is not served with continuous batching; leave it out",
                    param=field,
                )
        for field in LENGTHS:
            value = body.get(field)
            if value is not None and (not isinstance(value, int) or value is True or value < 1):
                raise RequestError(
                    400, f"`{field}` is a number of tokens, at least 1; got {value!r}", param=field
                )
        self._check_sampling(body)
        if self.prompt not in body:
            raise RequestError(400, f"`{self.prompt}` is missing", param=self.prompt)
        if self.chat and getattr(self._served.tokenizer, "chat_template", None) is None:
            raise RequestError(
                400,
                f"the tokenizer of {self._served.name!r} has no chat template; ask "
                "/v1/completions with a `prompt`",
            )
        given = body.get("chat_template_kwargs") or {}
        own = inspect.signature(self._served.tokenizer.apply_chat_template).parameters
        if not isinstance(given, dict) or not own.keys().isdisjoint(given):
            raise RequestError(
                400,
                "`chat_template_kwargs` is an object with the template's own variables; "
                f"got {given!r:.80}",
                param="chat_template_kwargs",
            )

    def _check_sampling(self, body: dict[str, Any]) -> None:
        for field, low, high in (("temperature", 0.0, sys.float_info.max), ("top_p", 0.0, 1.0)):
            value = body.get(field)
            if value is None:
                continue
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not number or not low <= value <= high:
                raise RequestError(
                    400,
                    f"`{field}` is a number from {low:g} to {high:g}; got {value!r}",
                    param=field,
                )
        sampled = self._generation.sampled
        if body.get("seed") is not None:
            if sampled:
                raise RequestError(
                    400,
                    "`seed` is not served: requests of one batch draw from one generator; "
                    "leave it out",
                    param="seed",
                )
            del body["seed"]  # no number is drawn; transformers would set the process's seed
        if not sampled and body.get("temperature"):
            raise RequestError(
                400,
                "this server takes the likeliest token; leave `temperature` out or send 0, or "
                "have it started with --temperature",
                param="temperature",
            )

    @staticmethod
    def get_processor_inputs_from_messages(messages: Any, modality: Modality) -> list[dict]:
        """transformers' form of a request's messages, which have text only."""
        if not isinstance(messages, list) or not messages:
            raise RequestError(400, "`messages` is a list of messages, at least one")
        for message in messages:
            if not isinstance(message, dict) or not isinstance(message.get("role"), str):
                raise RequestError(
                    400, f"a message is an object with a `role`; got {message!r:.80}"
                )
            content = message.get("content")
            if content is None or isinstance(content, str):
                continue
            for part in content if isinstance(content, list) else [content]:
                kind = part.get("type") if isinstance(part, dict) else None
                if kind not in TEXT_PARTS or not isinstance(part.get("text"), str):
                    raise RequestError(
                        400,
                        "the content of a message is text: a string, or parts of the types "
                        f"{', '.join(TEXT_PARTS)}; got {kind or part!r:.80}",
                    )
        return BaseHandler.get_processor_inputs_from_messages(messages, modality)


class Chat(AdapterHandler, ChatCompletionHandler):
    """/v1/chat/completions."""


class Completions(AdapterHandler, CompletionHandler):
    """/v1/completions."""

    prompt = "prompt"
    chat = False


class Responses(AdapterHandler, ResponseHandler):
    """/v1/responses."""

    prompt = "input"

    async def handle_request(self, body: dict[str, Any], request_id: str) -> Any:
        """As the others; OpenAI streams only where it is asked to, transformers always."""
        body.setdefault("stream", False)
        return await super().handle_request(body, request_id)
