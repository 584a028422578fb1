"""/v1/messages: Anthropic's form of a chat, with its events of a stream.

body ─▶ AnthropicFields ─▶ ChatFields ─▶ prompt ─▶ sequence ─▶ blocks of a message
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import AsyncIterator, Iterator, Mapping
from itertools import groupby
from typing import Any
from uuid import uuid4

from pydantic import Field
from transformers.cli.serving.utils import ReasoningText, ToolCall

from lorafx.errors import LorafxError
from lorafx.generation.continuous.adapter_requests import SequenceOutput
from lorafx.integrations.server.answers import versions_of
from lorafx.integrations.server.choices import Prompt
from lorafx.integrations.server.errors import RequestError, message_of
from lorafx.integrations.server.fields import ChatFields, Fields
from lorafx.integrations.server.generating import Sequences
from lorafx.integrations.server.handlers import MessageHandler
from lorafx.integrations.server.messages import input_messages
from lorafx.integrations.server.responses import event_line
from lorafx.integrations.server.texts import MessageSequence

_Event = dict[str, Any]
#: Anthropic's names of the modes of `tool_choice`, and those of a chat.
_CHOICES = {"auto": "auto", "none": "none", "any": "required"}
#: Fields that a chat has, too.
_SAME = ("stream", "add_special_tokens", "logit_bias", "max_tokens", "chat_template_kwargs")


class AnthropicFields(Fields):
    """The fields of /v1/messages and of /v1/messages/count_tokens."""

    messages: Any
    max_tokens: int | None = Field(default=None, ge=1)
    system: Any = ""
    stop_sequences: list[str] = Field(default=[])
    tools: list[dict[str, Any]] = Field(default=[])
    tool_choice: dict[str, Any] = Field(default={"type": "auto"})
    output_config: dict[str, Any] = Field(default={})
    thinking: dict[str, Any] = Field(default={"type": "disabled"})
    chat_template_kwargs: dict[str, Any] = Field(default={})

    def as_chat(self) -> dict[str, Any]:
        """The body of a chat that asks for the same. Raises RequestError for what is not served.
        An assistant's message at the end is the beginning of the answer."""
        if self.thinking.get("type") not in ("disabled", "adaptive"):
            raise RequestError(
                "`thinking` is disabled or adaptive: the chat template says whether a model thinks,"
                " by variables in `chat_template_kwargs`",
                "thinking",
            )
        before = [{"role": "system", "content": self.system}] if self.system else []
        if not isinstance(self.messages, list) or not self.messages:
            raise RequestError("`messages` is a list of messages, at least one", "messages")
        messages = input_messages([*before, *(turn for m in self.messages for turn in _turns(m))])
        begun = messages[-1]["role"] == "assistant"
        return {
            **self.choosing,
            **{name: getattr(self, name) for name in _SAME},
            "messages": messages,
            "stop": self.stop_sequences,
            "tools": [*map(_tool, self.tools)],
            "tool_choice": self._choice(),
            "parallel_tool_calls": not self.tool_choice.get("disable_parallel_tool_use"),
            "response_format": self._format(),
            "add_generation_prompt": not begun,
            "continue_final_message": begun,
        }

    def _choice(self) -> Any:
        kind, name = self.tool_choice.get("type"), self.tool_choice.get("name")
        if kind == "tool":
            return {"type": "function", "function": {"name": name}}
        if not isinstance(kind, str) or kind not in _CHOICES:
            raise RequestError(f"`tool_choice` has no type {kind!r:.80}", "tool_choice")
        return _CHOICES[kind]

    def _format(self) -> dict[str, Any] | None:
        if unknown := self.output_config.keys() - {"format"}:
            raise RequestError(f"`output_config` has no {min(unknown)!r:.80}", "output_config")
        asked = self.output_config.get("format")
        return asked and {"type": "json_schema", "json_schema": asked}


def _turns(message: Any) -> Iterator[dict[str, Any]]:
    """The messages of a chat that a message is: texts in a row are one, other blocks one each."""
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise RequestError(f"a message is an object with a `role`; got {message!r:.80}", "messages")
    content = message.get("content")
    if not isinstance(content, list):
        yield message
        return
    for kind, blocks in groupby(content, lambda b: b.get("type") if isinstance(b, dict) else None):
        if kind == "text":
            yield {"role": message["role"], "content": [*blocks]}
        else:
            yield from map(_turn, blocks)


def _turn(block: Any) -> dict[str, Any]:
    """The message of a chat that a block is which is not text."""
    match block:
        case {"type": "thinking", "thinking": text}:
            return {"role": "assistant", "reasoning_content": text}
        case {"type": "redacted_thinking"}:  # which only Anthropic can read
            return {"role": "assistant"}
        case {"type": "tool_use", "id": name, "name": called, "input": arguments}:
            function = {"name": called, "arguments": arguments}
            call = {"id": name, "type": "function", "function": function}
            return {"role": "assistant", "tool_calls": [call]}
        case {"type": "tool_result", "tool_use_id": name}:
            return {"role": "tool", "tool_call_id": name, "content": block.get("content")}
    raise RequestError(
        "the blocks of a message are text, thinking, tool_use and tool_result, with all of their "
        f"fields; got {block!r:.80}",
        "messages",
    )


def _tool(tool: dict[str, Any]) -> dict[str, Any]:
    if tool.get("type", "custom") not in ("custom", None) or not isinstance(tool.get("name"), str):
        raise RequestError(
            f"`tools` have a `name`, and are called by the client; got {tool!r:.80}", "tools"
        )
    kept = {name: tool[name] for name in ("name", "description", "strict") if name in tool}
    return {"type": "function", "function": {**kept, "parameters": tool.get("input_schema")}}


class Messages(MessageHandler):
    """/v1/messages."""

    fields = AnthropicFields

    def read(self, body: Mapping[str, Any]) -> ChatFields:
        asked: AnthropicFields = super().read(body)
        return ChatFields.read(asked.as_chat())

    def answer(
        self, fields: ChatFields, prompts: list[Prompt], name: str, model: str
    ) -> MessagesAnswer:
        return MessagesAnswer(fields.length, self.sequence(prompts[0], fields), name, model)

    def count(self, body: dict) -> dict[str, int]:
        """The answer of /v1/messages/count_tokens."""
        self.served.asked_for(body)
        (prompt,) = self.prompts(self.read(body))
        return {"input_tokens": len(prompt.ids)}


class MessagesAnswer:
    """An answer of /v1/messages, of at most `most` tokens. Events are read before the next one is
    made, which changes their blocks."""

    def __init__(self, most: int | None, sequence: MessageSequence, name: str, model: str) -> None:
        self._most, self._sequence = most, sequence
        head = {"id": f"msg_{name}", "type": "message", "role": "assistant", "model": model}
        self._head: dict[str, Any] = {**head, "stop_reason": None, "stop_sequence": None}
        self._blocks: list[dict[str, Any]] = []

    async def whole(self, sequences: Sequences) -> dict[str, Any]:
        """The answer when its sequence has ended."""
        async for _, output in sequences.outputs():
            deque(self._put(output), maxlen=0)
        return {**self._head, "content": self._blocks, "usage": self._usage()}

    async def events(self, sequences: Sequences) -> AsyncIterator[str]:
        """The events of a stream."""
        message = {**self._head, "content": [], "usage": self._usage()}
        try:
            yield event_line({"type": "message_start", "message": message})
            async for _, output in sequences.outputs():
                if lines := "".join(map(event_line, self._put(output))):
                    yield lines
        except LorafxError as error:
            why = {"type": "api_error", "message": message_of(error)}
            yield event_line({"type": "error", "error": why})

    def _put(self, output: SequenceOutput) -> Iterator[_Event]:
        """The events that are new after an output."""
        self._head |= versions_of(output)
        for part in self._sequence.put(output):
            yield from self._of_part(part)
        if output.is_finished():
            yield from self._end_block()
            stop = output.stop_reason if isinstance(output.stop_reason, str) else None
            ended = {"stop_reason": self._reason(output), "stop_sequence": stop}
            self._head |= ended
            yield {"type": "message_delta", "delta": ended, "usage": self._usage()}
            yield {"type": "message_stop", **versions_of(output)}

    def _of_part(self, part: Any) -> Iterator[_Event]:
        if isinstance(part, ToolCall):
            called = {"id": f"toolu_{uuid4().hex}", "name": part.name}
            yield from self._begin({"type": "tool_use", **called, "input": {}})
            delta = {"type": "input_json_delta", "partial_json": part.arguments}
            yield self._of_block("delta", delta=delta)
            self._blocks[-1]["input"] = json.loads(part.arguments)
            return
        kind = "thinking" if isinstance(part, ReasoningText) else "text"
        if not self._blocks or self._blocks[-1]["type"] != kind:
            signed = {"signature": ""} if kind == "thinking" else {}
            yield from self._begin({"type": kind, kind: "", **signed})
        self._blocks[-1][kind] += part
        yield self._of_block("delta", delta={"type": f"{kind}_delta", kind: part})

    def _begin(self, block: dict[str, Any]) -> Iterator[_Event]:
        yield from self._end_block()
        self._blocks.append(block)
        yield self._of_block("start", content_block=block)

    def _end_block(self) -> Iterator[_Event]:
        if self._blocks:
            yield self._of_block("stop")

    def _of_block(self, kind: str, **fields: Any) -> _Event:
        """An event of the last block."""
        return {"type": f"content_block_{kind}", "index": len(self._blocks) - 1, **fields}

    def _reason(self, output: SequenceOutput) -> str | None:
        if output.finish_reason == "length":
            cut = self._sequence.text.count == self._most
            return "max_tokens" if cut else "model_context_window_exceeded"
        if output.finish_reason != "stop":  # the server was paused
            return None
        if self._sequence.parts.calls:
            return "tool_use"
        return "stop_sequence" if isinstance(output.stop_reason, str) else "end_turn"

    def _usage(self) -> dict[str, int]:
        sequence = self._sequence
        return {"input_tokens": sequence.prompt_tokens, "output_tokens": sequence.text.count}
