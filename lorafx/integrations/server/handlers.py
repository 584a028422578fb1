"""transformers' handlers of requests, which choose an adapter and refuse what is not served."""

from __future__ import annotations

import inspect
import json
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import aclosing
from functools import partial
from typing import Any

from fastapi.responses import JSONResponse, StreamingResponse
from jinja2 import TemplateError
from transformers import GenerationConfig
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.completion import CompletionHandler
from transformers.cli.serving.response import ResponseHandler
from transformers.cli.serving.utils import BaseHandler, Modality

from lorafx.adapter_store.names import BASE
from lorafx.generation.continuous.sampling import (
    COLDEST,
    RANGES,
    sampling_number,
    sampling_range,
)
from lorafx.integrations.server.errors import RequestError, status_of
from lorafx.integrations.server.generating import UNKNOWN, Generation, Metrics, ServedModel

#: Neutral values, and the fields of OpenAI and vLLM that are accepted with these only. Other values
#: would change the answer, but transformers' server ignores or does not know them, or honours them
#: only without continuous batching.
_FIELDS: Sequence[tuple[tuple[Any, ...], str]] = (
    (
        (),
        "allowed_token_ids audio chat_template conversation generation_config guided_choice "
        "guided_grammar guided_json guided_regex previous_response_id prompt_logprobs "
        "structured_outputs truncate_prompt_tokens",
    ),
    (
        (False,),
        "background continue_final_message echo ignore_eos include_stop_str_in_output "
        "logprobs return_token_ids return_tokens_as_token_ids use_beam_search",
    ),
    ((0,), "frequency_penalty min_p min_tokens presence_penalty priority top_logprobs"),
    (([],), "bad_words documents functions logits_processors stop_token_ids"),
    ((1,), "best_of length_penalty n repetition_penalty typical_p"),
    ((True,), "add_generation_prompt skip_special_tokens spaces_between_special_tokens"),
    (("auto", "none"), "function_call"),
    (({},), "logit_bias"),
    ((["text"],), "modalities"),
    (({"type": "text"},), "response_format"),
    (([], ""), "stop"),
    (({}, {"format": {"type": "text"}}), "text"),
    (("auto",), "tool_choice"),
    (("disabled",), "truncation"),
)
NEUTRAL = {field: values for values, fields in _FIELDS for field in fields.split()}


def _is_length(value: Any) -> bool:
    return isinstance(value, int) and value is not True and value > 0


def _is_sampling(name: str, value: Any) -> bool:
    return sampling_number(name, value) is not None


def _are_objects(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, dict) for item in value)


#: Fields that are served: a test of their values, and its description for error messages.
FORMS: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    **dict.fromkeys(
        ("max_tokens", "max_completion_tokens", "max_output_tokens"),
        (_is_length, "a number of tokens, at least 1"),
    ),
    **{name: (partial(_is_sampling, name), sampling_range(name)) for name in RANGES},
    "suffix": (lambda value: isinstance(value, str), "a string"),
    "tools": (_are_objects, "a list of objects"),
}
TEXT_PARTS = ("text", "input_text", "output_text")


class AdapterHandler(BaseHandler):
    """A mixin for transformers' handlers."""

    #: The field that holds the prompt, and whether it goes through the chat template.
    prompt = "messages"
    chat = True
    #: The end of OpenAI's streams on this route.
    closing = "data: [DONE]\n\n"

    def __init__(self, served: ServedModel, generation: Generation, metrics: Metrics) -> None:
        super().__init__(served, generation)
        self._served = served
        self._generation = generation
        self._metrics = metrics

    async def handle_request(self, body: dict[str, Any], request_id: str) -> Any:
        """Answer a request. Raises RequestError if it is refused."""
        label = UNKNOWN
        self._metrics.running.inc()
        try:
            _refuse_surrogates(body)
            adapter = self._served.adapter_of(body.get("model"))
            label = BASE if adapter is None else adapter
            body = self._served_fields(body)
            try:
                handler: Any = super()
                response: StreamingResponse | JSONResponse
                response = await handler.handle_request(body, request_id)
            except TemplateError as error:
                why = f"the chat template refuses the messages: {error}"
                raise RequestError(why, self.prompt) from error
        except BaseException as error:
            self._metrics.ended(label, status_of(error))
            raise
        if isinstance(response, StreamingResponse):
            response.body_iterator = self._counting(response.body_iterator, label)
        else:
            self._metrics.ended(label, response.status_code)
        return response

    async def _counting(self, chunks: Any, label: str) -> AsyncIterator[Any]:
        status = 499
        try:
            async with aclosing(chunks):  # closing it early cancels the request
                async for chunk in chunks:
                    yield chunk
                if self.closing:
                    yield self.closing
            status = 200
        finally:
            self._metrics.ended(label, status)

    def _resolve_model(self, body: dict[str, Any]) -> tuple[str, Any, Any]:
        return body["model"], self._served.compiled.model, self._served.tokenizer

    def _validate_request(self, body: dict[str, Any]) -> None:
        # transformers does not know this field.
        super()._validate_request({name: body[name] for name in body if name != "top_k"})

    def _build_generation_config(
        self, body: dict[str, Any], model_generation_config: GenerationConfig, use_cb: bool = False
    ) -> GenerationConfig:
        """The settings of the request, with the server's as defaults."""
        config = super()._build_generation_config(body, self._generation.config, use_cb=use_cb)
        config.top_k = body.get("top_k", config.top_k)
        return config

    def _served_fields(self, body: dict[str, Any]) -> dict[str, Any]:
        """The fields of `body` without those that have neutral values. Raises RequestError if one
        would not be honoured, or would fail later."""
        body = {f: value for f, value in body.items() if value is not None or f == self.prompt}
        for field, values in NEUTRAL.items():
            if field in body and body.pop(field) not in values:
                neutral = " or ".join(map(repr, values))
                raise RequestError(
                    f"`{field}` is not served with continuous batching; leave it out"
                    + (f", or send {neutral}" if neutral else ""),
                    field,
                )
        for field, (is_valid, form) in FORMS.items():
            if field in body and not is_valid(body[field]):
                raise RequestError(f"`{field}` is {form}; got {body[field]!r:.80}", field)
        # transformers would seed the process's generator.
        drawn = body.get("temperature", self._generation.config.temperature) >= COLDEST
        if body.pop("seed", None) is not None and drawn:
            raise RequestError(
                "`seed` is not served: requests of one batch draw from one generator; leave it "
                "out, or send `temperature` 0, which draws nothing",
                "seed",
            )
        if self.prompt not in body:
            raise RequestError(f"`{self.prompt}` is missing", self.prompt)
        if self.chat and getattr(self._served.tokenizer, "chat_template", None) is None:
            raise RequestError(
                f"the tokenizer of {self._served.name!r} has no chat template; ask "
                "/v1/completions with a `prompt`"
            )
        variables = body.get("chat_template_kwargs") or {}
        taken = inspect.signature(self._served.tokenizer.apply_chat_template).parameters
        if not isinstance(variables, dict) or not taken.keys().isdisjoint(variables):
            raise RequestError(
                "`chat_template_kwargs` is an object with the template's own variables; "
                f"got {variables!r:.80}",
                "chat_template_kwargs",
            )
        return body

    @staticmethod
    def get_processor_inputs_from_messages(messages: Any, modality: Modality) -> list[dict]:
        """A request's messages in transformers' form. Raises RequestError unless they are text."""
        if not isinstance(messages, list) or not messages:
            raise RequestError("`messages` is a list of messages, at least one")
        for message in messages:
            if not isinstance(message, dict) or not isinstance(message.get("role"), str):
                raise RequestError(f"a message is an object with a `role`; got {message!r:.80}")
            content = message.get("content")
            if content is None or isinstance(content, str):
                continue
            for part in content if isinstance(content, list) else [content]:
                kind = part.get("type") if isinstance(part, dict) else None
                if kind not in TEXT_PARTS or not isinstance(part.get("text"), str):
                    raise RequestError(
                        "the content of a message is text: a string, or parts of the types "
                        f"{', '.join(TEXT_PARTS)}; got {kind or part!r:.80}"
                    )
        return BaseHandler.get_processor_inputs_from_messages(messages, modality)


def _refuse_surrogates(body: Mapping[str, Any]) -> None:
    """Raise RequestError if the body has half of a surrogate pair. JSON can escape one, but neither
    a tokenizer nor an answer can encode it."""
    try:
        json.dumps(body, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = error.object[error.start]
        raise RequestError(
            f"the request holds {half!r}, half of a surrogate pair; send whole characters"
        ) from error


class Chat(AdapterHandler, ChatCompletionHandler):
    """/v1/chat/completions."""


class Completions(AdapterHandler, CompletionHandler):
    """/v1/completions."""

    prompt = "prompt"
    chat = False


class Responses(AdapterHandler, ResponseHandler):
    """/v1/responses."""

    prompt = "input"
    closing = ""  # the type of the last event ends the stream

    async def handle_request(self, body: dict[str, Any], request_id: str) -> Any:
        """Answer a request. Without `stream` OpenAI does not stream, but transformers does."""
        body.setdefault("stream", False)
        return await super().handle_request(body, request_id)
