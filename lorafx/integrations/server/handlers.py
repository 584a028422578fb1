"""What is answered on the routes that generate: prompts are made of fields, sequences of prompts,
and an answer of sequences."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncIterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, Protocol, cast

from fastapi import Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from transformers.utils.chat_parsing.response_templates import ResponseTemplate

from lorafx.errors import BatchError
from lorafx.generation.continuous.parameters import checked_prompt
from lorafx.integrations.server.answers import ChoicesAnswer
from lorafx.integrations.server.call_grammars import answer_grammar, inlined
from lorafx.integrations.server.choices import ChatChoice, CompletionChoice, Prompt
from lorafx.integrations.server.errors import RequestError
from lorafx.integrations.server.fields import (
    ChatFields,
    CompletionFields,
    Fields,
    GrammarSource,
    MessageFields,
    ResponseFields,
)
from lorafx.integrations.server.generating import GeneratingModel, Sequences, ServedModel
from lorafx.integrations.server.media import Media
from lorafx.integrations.server.messages import text_messages
from lorafx.integrations.server.request_log import current_record
from lorafx.integrations.server.responses import ResponseAnswer
from lorafx.integrations.server.texts import (
    MessageReader,
    MessageSequence,
    SequenceText,
    opened_reasoning,
)
from lorafx.torch_internals.response_parser import CALLS, AnswerParser


class AnyAnswer(Protocol):
    """The answer to a request."""

    async def whole(self, sequences: Sequences) -> dict[str, Any]:
        """The answer when all sequences have ended."""

    def events(self, sequences: Sequences) -> AsyncIterator[str]:
        """The events of a stream."""


#: Prompts of bodies with more bytes are made in a thread: millions of tokens take seconds.
_LARGE = 1 << 16


class Handler:
    """Answers the requests of a route, which have these `fields`."""

    fields: type[Fields]

    def __init__(self, served: GeneratingModel) -> None:
        self.served = served

    def read(self, body: Mapping[str, Any]) -> Any:
        """The fields of a request. Raises RequestError if one is not served."""
        return self.fields.read(body, self.served.settings.max_logprobs)

    def prompts(self, fields: Any) -> list[Prompt]:
        """The prompts of a request, at least one. Raises RequestError if there is none."""
        raise NotImplementedError

    def cut(self, prompt: Prompt, fields: Any) -> Prompt:
        """The last tokens of a prompt, as many as are asked for by `truncate_prompt_tokens`."""
        most = fields.truncate_prompt_tokens
        if most == -1:
            answer = 1 if fields.length is None else fields.length
            most = max(1, self.served.most_tokens - answer)
        length = len(prompt.ids)
        return prompt if most is None or length <= most else Prompt(prompt.ids[length - most :])

    def grammar(self, fields: Any, prompts: list[Prompt]) -> GrammarSource | None:
        """What the answer has to keep to. Raises RequestError if that is of no known form."""
        source: GrammarSource | None = fields.grammar()
        return source

    def answer(self, fields: Any, prompts: list[Prompt], name: str, model: str) -> AnyAnswer:
        """The answer to a request that is called `name`, as the `model` that it asks for."""
        raise NotImplementedError

    async def handle(self, request: Request, body: dict) -> Response:
        """Answer a request. Raises RequestError if it is refused."""
        adapter = await self.served.resolve(body)
        current_record().asks_for(adapter)
        fields = self.read(body)
        self.served.queue.take(fields.sequences, had=1)
        large = self.served.processor is not None or len(await request.body()) > _LARGE
        prompts = await asyncio.to_thread(self.prompts, fields) if large else self.prompts(fields)
        arguments = await self.served.arguments(fields, self.grammar(fields, prompts))
        answer = self.answer(fields, prompts, request.state.request_id, body["model"])
        await self.served.control.admitted()
        sequences = Sequences(self.served, adapter)
        for prompt in prompts:
            more: dict[str, Any] = {} if prompt.inputs is None else {"inputs": prompt.inputs}
            sequences.add(prompt.ids, fields.length, streaming=fields.stream, **more, **arguments)
        if fields.stream:
            return StreamingResponse(answer.events(sequences), media_type="text/event-stream")
        return JSONResponse(await answer.whole(sequences))


class Completions(Handler):
    """/v1/completions."""

    fields = CompletionFields

    def prompts(self, fields: CompletionFields) -> list[Prompt]:
        asked = prompts_of(self.served, "prompt", fields.prompt, fields.add_special_tokens)
        return [self.cut(prompt, fields) for prompt in asked]

    def answer(
        self, fields: CompletionFields, prompts: list[Prompt], name: str, model: str
    ) -> ChoicesAnswer:
        common = fields, self.served.tokenizer, self.served.ends
        each = [prompt for prompt in prompts for _ in range(fields.n)]
        choices = [CompletionChoice(index, prompt, *common) for index, prompt in enumerate(each)]
        head = {"id": f"cmpl-{name}", "object": "text_completion", "model": model}
        return ChoicesAnswer(fields, prompts, choices, head)


class MessageHandler(Handler):
    """Makes the prompt of messages, which are in the field `asked`, by the tokenizer's chat
    template."""

    asked = "messages"
    #: Whether messages may have images and sounds.
    media = False

    def prompts(self, fields: Any) -> list[Prompt]:
        _check_chat(self.served, fields)
        media = Media(self.served.processor, self.served.settings) if self.media else None
        messages = text_messages(fields.messages, media)
        text = _rendered(
            self.served,
            messages,
            self.asked,
            tools=fields.used_tools,
            add_generation_prompt=fields.add_generation_prompt,
            continue_final_message=fields.continue_final_message,
            **fields.variables,
        )
        special = bool(fields.add_special_tokens)
        if media:
            return [_with_media(self.served, media, text, special, fields)]
        prompt = _encoded(self.served, text, special=special)
        return [self.cut(prompt, fields)._replace(text=text)]

    def grammar(self, fields: Any, prompts: list[Prompt]) -> GrammarSource | None:
        asked, tools, template = fields.grammar(), fields.used_tools, self.served.template
        mode, names = fields.choice
        strict = any(tool["function"].get("strict") is True for tool in tools or ())
        forced = mode in ("required", "named")
        as_json = asked is not None and asked.kind == "json" and isinstance(asked.value, dict)
        if not tools or template is None or not (forced or strict or names or as_json):
            return cast("GrammarSource | None", asked)
        if asked is not None and not (forced or as_json):
            raise RequestError(
                f"an answer keeps to `{asked.field}` or to strict or allowed `tools`; send one",
                asked.field,
            )
        value = partial(
            answer_grammar,
            template,
            [*map(inlined, tools)],
            forced=forced,
            parallel=fields.parallel_tool_calls and mode != "named",
            opened=self._opened(template, prompts[0], fields),
            schema=asked and asked.value,
        )
        return GrammarSource("tool_choice" if forced or names else "tools", "calls", value)

    def _opened(self, template: ResponseTemplate, prompt: Prompt, fields: Any) -> str:
        continued = fields.continue_final_message
        begun = text_messages(fields.messages[-1:])[-1]["content"] if continued else ""
        return opened_reasoning(template, prompt.text or "", begun)

    def sequence(self, prompt: Prompt, fields: ChatFields | ResponseFields) -> MessageSequence:
        """The only sequence of an answer."""
        parts, stops = self._parts(prompt, fields), getattr(fields, "stops", ())
        tokenizer: Any = self.served.tokenizer.backend_tokenizer
        special = {"skip_special_tokens": not parts.special}
        text = SequenceText(tokenizer, stops, self.served.ends, **special)
        return MessageSequence(len(prompt.ids), text, parts)

    def _parts(self, prompt: Prompt, fields: ChatFields | ResponseFields) -> MessageReader:
        template, tools = self.served.template, [*map(inlined, fields.used_tools or ())]
        if template is None:
            return MessageReader(None, fields.parallel_tool_calls)
        if not tools:  # what looks like a call is text
            kept = {name: field for name, field in template.fields.items() if name != CALLS}
            template = replace(template, fields=kept)
        parser = AnswerParser(template, tools, self._opened(template, prompt, fields))
        return MessageReader(parser, fields.parallel_tool_calls)


class Chat(MessageHandler):
    """/v1/chat/completions."""

    fields, media = ChatFields, True

    def answer(
        self, fields: ChatFields, prompts: list[Prompt], name: str, model: str
    ) -> ChoicesAnswer:
        common = prompts[0], fields, self.served.tokenizer, self.served.ends
        choices = [
            ChatChoice(index, *common, parts=self._parts(prompts[0], fields))
            for index in range(fields.n)
        ]
        kind = "chat.completion.chunk" if fields.stream else "chat.completion"
        head = {"id": f"chatcmpl-{name}", "object": kind, "model": model}
        return ChoicesAnswer(fields, prompts, choices, head, chat=True)


class Responses(MessageHandler):
    """/v1/responses."""

    fields, asked = ResponseFields, "input"

    def answer(
        self, fields: ResponseFields, prompts: list[Prompt], name: str, model: str
    ) -> ResponseAnswer:
        return ResponseAnswer(fields, self.sequence(prompts[0], fields), name, model)


def prompts_of(served: ServedModel, field: str, asked: Any, special: bool | None) -> list[Prompt]:
    """The prompts that a field asks for, with special tokens unless `special` is False. Raises
    RequestError if it has another form."""
    if not isinstance(asked, str | list) or asked == []:
        raise RequestError(
            f"`{field}` is a string, a list of token ids, or a list of such {field}s, at least "
            f"one; got {asked!r:.80}",
            field,
        )
    single = isinstance(asked, str) or all(
        isinstance(token, int) and not isinstance(token, bool) for token in asked
    )
    prompts = []
    for prompt in [asked] if single else asked:
        if isinstance(prompt, str):
            prompts.append(_encoded(served, prompt, special=special is not False))
            continue
        try:
            prompts.append(Prompt(checked_prompt(served.compiled._orig_mod, prompt)))
        except BatchError as error:
            raise RequestError(f"`{field}`: {error}", field) from error
    return prompts


def _encoded(served: ServedModel, text: str, special: bool) -> Prompt:
    """The prompt of a text, with `special` tokens or without."""
    return Prompt(served.tokenizer(text, add_special_tokens=special)["input_ids"], text)


def _with_media(
    served: GeneratingModel, media: Media, text: str, special: bool, fields: Any
) -> Prompt:
    """The prompt of a text with images and sounds. Raises RequestError if it cannot be one."""
    if fields.truncate_prompt_tokens is not None:
        raise RequestError(
            "`truncate_prompt_tokens` is for prompts of text; leave it out",
            "truncate_prompt_tokens",
        )
    inputs = media.inputs(text, special)
    model: Any = served.compiled._orig_mod
    inputs = {name: value.to(model.device) for name, value in inputs.items()}
    return Prompt(inputs["input_ids"][0].tolist(), text, inputs)


def _check_chat(served: GeneratingModel, fields: MessageFields) -> None:
    """Raise RequestError if the model's tokenizer makes no prompt of messages with these fields, or
    nothing can be parsed that it answers to tools."""
    tokenizer = cast("Any", served.tokenizer)
    if getattr(tokenizer, "chat_template", None) is None:
        raise RequestError(
            f"the tokenizer of {served.name!r} has no chat template; ask /v1/completions with a "
            "`prompt`"
        )
    taken = {"messages", *inspect.signature(tokenizer.apply_chat_template).parameters}
    if not taken.isdisjoint(fields.chat_template_kwargs):
        raise RequestError(
            "`chat_template_kwargs` is an object with the template's own variables; got "
            f"{fields.chat_template_kwargs!r:.80}",
            "chat_template_kwargs",
        )
    if not fields.used_tools:
        return
    if served.template is None:
        raise RequestError(
            "`tools` are not served for this model: its tokenizer has no response template, by "
            "which calls are found in an answer",
            "tools",
        )
    prompt = partial(_rendered, served, [{"role": "user", "content": ""}], "tools")
    if prompt(tools=fields.used_tools) == prompt():
        raise RequestError("`tools` are not in this model's chat template", "tools")


def _rendered(
    served: ServedModel, messages: list[dict[str, Any]], field: str, /, **variables: Any
) -> str:
    """The text that the tokenizer's chat template makes of messages. Raises RequestError if it
    refuses them."""
    tokenizer: Any = served.tokenizer
    try:
        text: str = tokenizer.apply_chat_template(messages, tokenize=False, **variables)
    except Exception as error:  # a template may do anything with what was sent
        raise RequestError(
            f"the chat template refuses the `{field}`: {error!s:.500}", field
        ) from error
    return text
