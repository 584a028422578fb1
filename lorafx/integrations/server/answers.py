"""Answers to requests, whole or as a stream of events: those that have choices, and responses.

sequences ── outputs ─▶ Choice, one for each sequence ─▶ ChoicesAnswer
                        transformers' builder of events ─▶ ResponseAnswer
"""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any, TypeAlias
from uuid import uuid4

from transformers.cli.serving.response import compute_usage
from transformers.cli.serving.utils import ReasoningText, ToolCall

from lorafx.errors import LorafxError
from lorafx.generation.continuous.adapter_requests import SequenceOutput
from lorafx.integrations.server.choices import Choice, Prompt
from lorafx.integrations.server.errors import error_response, message_of
from lorafx.integrations.server.fields import SequenceFields
from lorafx.integrations.server.generating import Sequences
from lorafx.integrations.server.texts import MessageParts, SequenceText
from lorafx.torch_internals.transformers_parts import response_parts

#: Events that end an item of a response, and a response.
_ENDS = ("response.output_item.done", "response.completed")


class ChoicesAnswer:
    """An answer with a choice for each sequence. Its `head` is what all chunks of a stream have in
    common. In a `chat` choices are messages, and fields of the prompt stand beside them."""

    def __init__(
        self,
        fields: SequenceFields,
        prompts: Sequence[Prompt],
        choices: Sequence[Choice],
        head: dict[str, Any],
        chat: bool = False,
    ) -> None:
        self._options, self._prompts, self._choices = fields.stream_options, prompts, choices
        self._head, self._chat = {**head, "created": int(time.time())}, chat

    async def whole(self, sequences: Sequences) -> dict[str, Any]:
        """The answer when all sequences have ended."""
        answer: dict[str, Any] = {**self._head, "choices": [None] * len(self._choices)}
        async for index, output in sequences.outputs():
            answer["choices"][index] = self._choices[index].put(output, whole=True)
            answer |= versions_of(output)
            place = answer if self._chat else answer["choices"][index]
            place.update(self._choices[index].of_prompt(output))
        return {**answer, "usage": self._usage()}

    async def events(self, sequences: Sequences) -> AsyncIterator[str]:
        """The events of a stream."""
        unnamed = range(len(self._choices) if self._chat else 0)
        delta = {"role": "assistant", "content": ""}
        try:
            async for index, output in sequences.outputs():
                self._head |= versions_of(output)
                for choice in unnamed:  # not before: clients measure the time to the first chunk
                    yield self._chunk([{"index": choice, "delta": delta, "finish_reason": None}])
                unnamed = range(0)
                piece = self._choices[index].put(output)
                if piece is not None:
                    yield self._chunk([piece], self._options.get("continuous_usage_stats"))
            if self._options.get("include_usage"):
                yield self._chunk([], True)
        except LorafxError as error:
            yield f"data: {bytes(error_response(error).body).decode()}\n\n"
        yield "data: [DONE]\n\n"

    def _chunk(self, choices: list[Any], counted: bool | None = False) -> str:
        usage = self._usage() if counted else None
        asked = {"usage": usage} if self._options.get("include_usage") else {}
        whole = json.dumps({**self._head, "choices": choices, **asked}, ensure_ascii=False)
        return f"data: {whole}\n\n"

    def _usage(self) -> dict[str, int]:
        prompt = sum(len(prompt.ids) for prompt in self._prompts)
        new = sum(choice.text.count for choice in self._choices)
        counts = {"prompt_tokens": prompt, "completion_tokens": new}
        return {**counts, "total_tokens": prompt + new}


class ResponseAnswer:
    """An answer of /v1/responses, whose last event has all of it. It has one sequence, with this
    `text`, in which `parts` finds those of a message."""

    def __init__(
        self, prompt: Prompt, text: SequenceText, parts: MessageParts, name: str, model: str
    ) -> None:
        self._prompt, self._text, self._parts = prompt, text, parts
        head = {"id": f"resp_{name}", "created_at": time.time(), "model": model}
        fixed = {"object": "response", "tools": [], "tool_choice": "auto"}
        self._head = head | {**fixed, "parallel_tool_calls": False}
        builder, _, _ = response_parts()
        self._builder = builder(request_id=name, response_defaults=self._head)

    async def whole(self, sequences: Sequences) -> dict[str, Any]:
        """The answer when its sequence has ended."""
        (events,) = [self._put(output) async for _, output in sequences.outputs()]
        answer: dict[str, Any] = json.loads(events[-1].removeprefix("data: "))["response"]
        return answer

    async def events(self, sequences: Sequences) -> AsyncIterator[str]:
        """The events of a stream."""
        try:
            yield "".join(self._builder.start_response())
            async for _, output in sequences.outputs():
                if events := self._put(output):
                    yield "".join(events)
        except LorafxError as error:
            yield "".join(self._builder.error(message_of(error)))

    def _put(self, output: SequenceOutput) -> list[str]:
        """The events that are new after an output."""
        builder, events, ended = self._builder, list[str](), output.is_finished()
        self._head |= versions_of(output)
        text, _ = self._text.put(output)
        for part in self._parts.put(text, output):
            if isinstance(part, ToolCall):
                events += self._end_text()
                events += builder.tool_call(f"call_{uuid4().hex}", part.name, part.arguments)
            elif isinstance(part, ReasoningText):
                events += [] if builder.reasoning_open else builder.start_reasoning()
                events += builder.reasoning_delta(part)
            else:
                events += builder.finish_reasoning() if builder.reasoning_open else []
                events += [] if builder.message_open else builder.start_message()
                events += builder.text_delta(part)
        if ended:
            events += self._end(output.finish_reason)
        return events

    def _end(self, reason: str | None) -> list[str]:
        """The last events."""
        builder, events = self._builder, self._end_text()
        if builder.message_item is None:  # an answer always has one
            events += [*builder.start_message(), *builder.finish_message()]
        events += builder.completed(compute_usage(len(self._prompt.ids), self._text.count))
        return events if reason == "stop" else _of_cut(events, reason)

    def _end_text(self) -> list[str]:
        builder = self._builder
        events: list[str] = builder.finish_reasoning() if builder.reasoning_open else []
        return events + (builder.finish_message() if builder.message_open else [])


def _of_cut(events: Sequence[str], reason: str | None) -> list[str]:
    """The last events of an answer that was cut, made of those of one that ended by itself, since
    transformers has no others."""
    made = [json.loads(event.removeprefix("data: ")) for event in events]
    *items, last = [event for event in made if event["type"] in _ENDS]
    cut = {event["item"]["id"] for event in items}
    last["type"], response = "response.incomplete", last["response"]
    response["status"] = "incomplete"
    if reason == "length":
        response["incomplete_details"] = {"reason": "max_output_tokens"}
    for item in (*(event["item"] for event in items), *response["output"]):
        item["status"] = "incomplete" if item["id"] in cut else item["status"]
    texts = (json.dumps(event, ensure_ascii=False, separators=(",", ":")) for event in made)
    return [f"data: {text}\n\n" for text in texts]


def versions_of(output: Any) -> dict[str, Any]:
    """The versions that a sequence is generated or a vector computed with, as fields of an answer.
    Those of all sequences of a request are the same."""
    return {name: getattr(output, name) for name in ("adapter_version", "weights_version")}


Answer: TypeAlias = ChoicesAnswer | ResponseAnswer
