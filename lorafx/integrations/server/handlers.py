"""What is answered on each route: prompts are made of a request's fields, sequences of prompts, and
choices of sequences. /v1/responses is transformers' own."""

from __future__ import annotations

import copy
import inspect
import json
import time
from collections.abc import AsyncIterator, Callable, Mapping
from functools import partial
from typing import Any, cast

from fastapi import HTTPException
from fastapi.responses import JSONResponse, StreamingResponse
from jinja2 import TemplateError
from transformers.cli.serving.response import ResponseHandler
from transformers.cli.serving.utils import (
    BaseHandler,
    CBWorkerDeadError,
    GenerationState,
    Modality,
    build_response_parser,
    get_response_template,
)

from lorafx.errors import BatchError, LorafxError
from lorafx.generation.continuous.manager import checked_prompt
from lorafx.generation.continuous.sampling import integer
from lorafx.integrations.server.choices import ChatChoice, Choice, CompletionChoice, Prompt
from lorafx.integrations.server.errors import RequestError, error_response
from lorafx.integrations.server.fields import (
    ChatFields,
    CompletionFields,
    MessageFields,
    ResponseFields,
    SequenceFields,
)
from lorafx.integrations.server.generating import (
    AdapterGeneration,
    Generation,
    Sequences,
    ServedModel,
)
from lorafx.integrations.server.request_log import current_record

TEXT_PARTS = ("text", "input_text", "output_text")


class SequenceHandler:
    """Answers the requests of a route whose answers have choices.

    Attributes:
        fields: the fields of its requests.
        kinds: the names of the forms of an answer, and of a chunk of one.
        prefix: what the names of its answers begin with.
    """

    fields: type[SequenceFields]
    kinds: tuple[str, str]
    prefix: str
    #: Whether a choice is a message, and what is known of the prompt's tokens is the answer's.
    chat: bool

    def __init__(self, served: ServedModel, generation: Generation) -> None:
        self.served, self.generation = served, generation

    def prompts(self, fields: Any) -> list[Prompt]:
        """The prompts of a request, at least one. Raises RequestError if there is none."""
        raise NotImplementedError

    def choice(self, index: int, prompt: Prompt, fields: Any) -> Choice:
        """The choice for one sequence of a prompt."""
        raise NotImplementedError

    def _encoded(self, text: str, fields: SequenceFields, *, special: bool) -> Prompt:
        """The prompt of a text, with `special` tokens unless the request says otherwise."""
        special = special if fields.add_special_tokens is None else fields.add_special_tokens
        return Prompt(self.served.tokenizer(text, add_special_tokens=special)["input_ids"], text)

    async def handle_request(self, body: dict[str, Any], request_id: str) -> Any:
        """Answer a request. Raises RequestError if it is refused."""
        adapter = await self.served.resolve(body.get("model"))
        current_record().asks_for(adapter)
        fields = self.fields.read(body)
        arguments = await self.generation.arguments(fields)
        prompts = self.prompts(fields)
        self.generation.queue.take(len(prompts) * fields.n, had=1)
        each = [prompt for prompt in prompts for _ in range(fields.n)]
        choices = [self.choice(index, prompt, fields) for index, prompt in enumerate(each)]
        sequences = Sequences(self.generation, adapter)
        for prompt in prompts:
            sequences.add(prompt.ids, fields.length, streaming=fields.stream, **arguments)
        head = {
            "id": f"{self.prefix}-{request_id}",
            "object": self.kinds[fields.stream],
            "created": int(time.time()),
            "model": body["model"],
        }

        def usage() -> dict[str, int]:
            counts = sum(len(p.ids) for p in prompts), sum(choice.text.count for choice in choices)
            names = "prompt_tokens", "completion_tokens", "total_tokens"
            return dict(zip(names, (*counts, sum(counts)), strict=True))

        if fields.stream:
            events = self._events(sequences, choices, head, fields.stream_options, usage)
            return StreamingResponse(events, media_type="text/event-stream")
        answer: dict[str, Any] = {**head, "choices": [None] * len(choices)}
        async for index, output in sequences.outputs():
            answer["choices"][index] = choices[index].put(output, whole=True)
            place = answer if self.chat else answer["choices"][index]
            place.update(choices[index].of_prompt(output))
        return JSONResponse({**answer, "usage": usage()})

    async def _events(
        self,
        sequences: Sequences,
        choices: list[Choice],
        head: dict[str, Any],
        options: Mapping[str, bool],
        usage: Callable[[], dict[str, int]],
    ) -> AsyncIterator[str]:
        """The events of a stream."""

        def chunk(choices: list[Any], counts: dict[str, int] | None = None) -> str:
            asked = {"usage": counts} if options.get("include_usage") else {}
            whole = json.dumps({**head, "choices": choices, **asked}, ensure_ascii=False)
            return f"data: {whole}\n\n"

        try:
            for index in range(len(choices) if self.chat else 0):
                delta = {"role": "assistant", "content": ""}
                yield chunk([{"index": index, "delta": delta, "finish_reason": None}])
            async for index, output in sequences.outputs():
                piece = choices[index].put(output)
                if piece is not None:
                    yield chunk([piece], usage() if options.get("continuous_usage_stats") else None)
            if options.get("include_usage"):
                yield chunk([], usage())
        except (LorafxError, CBWorkerDeadError) as error:
            yield f"data: {bytes(error_response(error).body).decode()}\n\n"
        yield "data: [DONE]\n\n"


class Completions(SequenceHandler):
    """/v1/completions."""

    fields, prefix, chat = CompletionFields, "cmpl", False
    kinds = "text_completion", "text_completion"

    def prompts(self, fields: CompletionFields) -> list[Prompt]:
        asked = fields.prompt
        if isinstance(asked, str) or _are_ids(asked):
            asked = [asked]
        if not isinstance(asked, list) or not asked:
            raise _no_prompt(asked)
        return [self._prompt(prompt, fields) for prompt in asked]

    def _prompt(self, asked: Any, fields: CompletionFields) -> Prompt:
        if isinstance(asked, str):
            return self._encoded(asked, fields, special=True)
        if not _are_ids(asked):
            raise _no_prompt(asked)
        try:
            return Prompt(checked_prompt(self.served.compiled.model, asked))
        except BatchError as error:
            raise RequestError(f"`prompt`: {error}", "prompt") from error

    def choice(self, index: int, prompt: Prompt, fields: CompletionFields) -> Choice:
        return CompletionChoice(index, prompt, fields, self.served.tokenizer, self.generation.ends)


class Chat(SequenceHandler):
    """/v1/chat/completions."""

    fields, prefix, chat = ChatFields, "chatcmpl", True
    kinds = "chat.completion", "chat.completion.chunk"

    def prompts(self, fields: ChatFields) -> list[Prompt]:
        check_chat(self.served, fields)
        messages = text_messages(fields.messages)
        try:
            tokenizer: Any = self.served.tokenizer
            text = tokenizer.apply_chat_template(
                messages,
                tools=fields.used_tools,
                add_generation_prompt=fields.add_generation_prompt,
                continue_final_message=fields.continue_final_message,
                tokenize=False,
                **fields.chat_template_kwargs,
            )
        except (TemplateError, ValueError) as error:
            raise _refused_by_template(error, "messages") from error
        return [self._encoded(text, fields, special=False)]

    def choice(self, index: int, prompt: Prompt, fields: ChatFields) -> Choice:
        tokenizer, model = self.served.tokenizer, cast("Any", self.served.compiled.model)
        parser = build_response_parser(tokenizer, model, prompt.ids, tools=fields.used_tools)
        return ChatChoice(index, prompt, fields, tokenizer, self.generation.ends, parser=parser)


class Responses(ResponseHandler):
    """/v1/responses."""

    def __init__(self, served: ServedModel, generation: Generation) -> None:
        super().__init__(served, GenerationState())
        self._served, self._generation = served, generation

    async def handle_request(self, body: dict[str, Any], request_id: str) -> Any:
        """Answer a request. Raises RequestError if it is refused."""
        adapter = await self._served.resolve(body.get("model"))
        current_record().asks_for(adapter)
        fields = ResponseFields.read(body)
        check_chat(self._served, fields)
        arguments = await self._generation.arguments(fields)
        handler = copy.copy(self)
        begin = partial(Sequences, self._generation, adapter)
        handler.generation_state = AdapterGeneration(begin, fields.max_output_tokens, arguments)
        # What is not here transformers would apply to the process, or not know.
        body = {"model": body["model"], **fields.model_dump(include=_PASSED, exclude_none=True)}
        if not fields.used_tools:
            body.pop("tools", None)
        try:
            return await super(Responses, handler).handle_request(body, request_id)
        except TemplateError as error:
            raise _refused_by_template(error, "input") from error

    def _validate_request(self, body: dict[str, Any]) -> None:
        """Do nothing: `ResponseFields` has been read."""

    @staticmethod
    def _normalize_input(body: dict[str, Any]) -> list[dict]:
        try:
            return super(Responses, Responses)._normalize_input(body)
        except (AttributeError, HTTPException, KeyError, TypeError) as error:
            raise RequestError(
                f"`input` is a string or a list of items: {error!r}", "input"
            ) from error

    def _resolve_model(self, body: dict[str, Any]) -> tuple[str, Any, Any]:
        return body["model"], self._served.compiled.model, self._served.tokenizer

    @staticmethod
    def get_processor_inputs_from_messages(messages: Any, modality: Modality) -> list[dict]:
        """A request's messages in transformers' form. Raises RequestError unless they are text."""
        return text_messages(messages)


#: Fields of /v1/responses that transformers' handler reads.
_PASSED = {"input", "instructions", "stream", "max_output_tokens", "chat_template_kwargs", "tools"}


def check_chat(served: ServedModel, fields: MessageFields) -> None:
    """Raise RequestError if the model's tokenizer makes no prompt of messages with these fields, or
    nothing can be parsed that it answers to tools."""
    tokenizer, model = cast("Any", served.tokenizer), cast("Any", served.compiled.model)
    if getattr(tokenizer, "chat_template", None) is None:
        raise RequestError(
            f"the tokenizer of {served.name!r} has no chat template; ask /v1/completions with a "
            "`prompt`"
        )
    taken = inspect.signature(tokenizer.apply_chat_template).parameters
    if not taken.keys().isdisjoint(fields.chat_template_kwargs):
        raise RequestError(
            "`chat_template_kwargs` is an object with the template's own variables; got "
            f"{fields.chat_template_kwargs!r:.80}",
            "chat_template_kwargs",
        )
    if fields.tool_choice not in ("auto", "none"):
        raise RequestError("`tool_choice` is auto or none: calls are not forced", "tool_choice")
    if not fields.used_tools:
        return
    if get_response_template(tokenizer, model) is None:
        raise RequestError(
            "`tools` are not served for this model: its tokenizer has no response template, by "
            "which calls are found in an answer",
            "tools",
        )
    prompt = partial(tokenizer.apply_chat_template, [{"role": "user", "content": ""}])
    try:
        used = prompt(tools=fields.used_tools, tokenize=False) != prompt(tokenize=False)
    except TemplateError as error:
        raise _refused_by_template(error, "tools") from error
    if not used:
        raise RequestError("`tools` are not in this model's chat template", "tools")


def text_messages(messages: Any) -> list[dict]:
    """A request's messages in transformers' form. Raises RequestError unless they are text."""
    if not isinstance(messages, list) or not messages:
        raise RequestError("`messages` is a list of messages, at least one", "messages")
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
    try:
        return BaseHandler.get_processor_inputs_from_messages(messages, Modality.LLM)
    except (KeyError, TypeError, ValueError) as error:  # of calls of tools
        raise RequestError(f"the `tool_calls` of a message cannot be read: {error!r}") from error


def _refused_by_template(error: Exception, field: str) -> RequestError:
    return RequestError(f"the chat template refuses the `{field}`: {error}", field)


def _are_ids(prompt: Any) -> bool:
    is_list = isinstance(prompt, list) and bool(prompt)
    return is_list and all(integer(token) is not None for token in prompt)


def _no_prompt(asked: Any) -> RequestError:
    return RequestError(
        "`prompt` is a string, a list of token ids, or a list of such prompts, at least one; got "
        f"{asked!r:.80}",
        "prompt",
    )
