"""Answers of /v1/responses: items, and the events of a stream in OpenAI's order.

created  in_progress
reasoning   item.added  part.added  reasoning_text.delta ...  .done  part.done  item.done
message     item.added  part.added  output_text.delta ...     .done  part.done  item.done
call        item.added              arguments.delta           .done             item.done
completed | incomplete | error  failed
"""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any, NamedTuple
from uuid import uuid4

from transformers.cli.serving.utils import ReasoningText, ToolCall

from lorafx.errors import LorafxError
from lorafx.generation.continuous.adapter_requests import SequenceOutput
from lorafx.integrations.server.answers import versions_of
from lorafx.integrations.server.errors import message_of
from lorafx.integrations.server.fields import ResponseFields
from lorafx.integrations.server.generating import Sequences
from lorafx.integrations.server.texts import MessageSequence

_Event = dict[str, Any]


class _Form(NamedTuple):
    """The form of items that have a text: their type, with what their IDs begin, the type of their
    part; and other fields of the item, of the part, and of events with text."""

    type: str
    prefix: str
    part: str
    of_item: dict[str, Any]
    of_part: dict[str, Any]
    of_text: dict[str, Any]


_NO_LOGPROBS: dict[str, Any] = {"logprobs": []}
_OF_TEXT = {"annotations": [], **_NO_LOGPROBS}
_MESSAGE = _Form("message", "msg", "output_text", {"role": "assistant"}, _OF_TEXT, _NO_LOGPROBS)
_REASONING = _Form("reasoning", "rs", "reasoning_text", {"summary": []}, {}, {})


class Items:
    """The items of a response, in the order in which they came, which is that of their indices.

    Attributes:
        output: those that have ended.
    """

    def __init__(self) -> None:
        self.output: list[dict[str, Any]] = []
        self._count = 0
        self._form: _Form | None = None
        self._id = self._text = ""

    def event(self, kind: str, **fields: Any) -> _Event:
        """The next event of the stream."""
        self._count += 1
        return {"type": kind, "sequence_number": self._count - 1, **fields}

    def put(self, part: Any) -> Iterator[_Event]:
        """The events of a part of the answer: text, reasoning or a call."""
        form = _REASONING if isinstance(part, ReasoningText) else _MESSAGE
        if isinstance(part, ToolCall):
            yield from self.end()
            yield from self._call(part)
            return
        if form is not self._form:
            yield from self.end()
            yield from self._begin(form)
        self._text += part
        yield self._of_text("delta", form, delta=part)

    def end(self, status: str = "completed") -> Iterator[_Event]:
        """End the item whose text has come so far, if there is one."""
        form, self._form = self._form, None
        if form is not None:
            yield self._of_text("done", form, text=self._text)
            yield self._of_part("done", form)
            yield self._of_item("done", form, status)

    def end_all(self, status: str) -> Iterator[_Event]:
        """End the answer, which has at least one item: an empty message."""
        if not self.output and self._form is None:
            yield from self._begin(_MESSAGE)
        yield from self.end(status)

    def _begin(self, form: _Form) -> Iterator[_Event]:
        self._form, self._id, self._text = form, f"{form.prefix}_{uuid4().hex}", ""
        yield self._of_item("added", form, "in_progress")
        yield self._of_part("added", form)

    def _call(self, call: ToolCall) -> Iterator[_Event]:
        self._id, kind = f"fc_{uuid4().hex}", "response.function_call_arguments"
        item = {"type": "function_call", "id": self._id, "call_id": f"call_{uuid4().hex}"}
        said, place = {"name": call.name, "arguments": call.arguments}, self._place()
        yield self._of_output("added", {**item, **said, "arguments": "", "status": "in_progress"})
        yield self.event(f"{kind}.delta", **place, delta=call.arguments)
        yield self.event(f"{kind}.done", **place, **said)
        yield self._of_output("done", {**item, **said, "status": "completed"})

    def _of_output(self, kind: str, item: dict[str, Any]) -> _Event:
        place = len(self.output)
        self.output += [item] if kind == "done" else []
        return self.event(f"response.output_item.{kind}", output_index=place, item=item)

    def _of_item(self, kind: str, form: _Form, status: str) -> _Event:
        content = [self._part(form)] if kind == "done" else []
        item = {"type": form.type, "id": self._id, "status": status, "content": content}
        return self._of_output(kind, {**item, **form.of_item})

    def _of_part(self, kind: str, form: _Form) -> _Event:
        place = {**self._place(), "content_index": 0}
        return self.event(f"response.content_part.{kind}", **place, part=self._part(form))

    def _of_text(self, kind: str, form: _Form, **text: str) -> _Event:
        place = {**self._place(), "content_index": 0}
        return self.event(f"response.{form.part}.{kind}", **place, **text, **form.of_text)

    def _part(self, form: _Form) -> dict[str, Any]:
        return {"type": form.part, "text": self._text, **form.of_part}

    def _place(self) -> dict[str, Any]:
        return {"item_id": self._id, "output_index": len(self.output)}


class ResponseAnswer:
    """An answer of /v1/responses, whose last event has all of it."""

    def __init__(
        self, fields: ResponseFields, sequence: MessageSequence, name: str, model: str
    ) -> None:
        self._sequence = sequence
        head = {"id": f"resp_{name}", "object": "response", "created_at": int(time.time())}
        nothing = {"error": None, "incomplete_details": None, "usage": None}
        self._head = {**head, "model": model, **nothing, **fields.echoed()}
        self._items = Items()

    async def whole(self, sequences: Sequences) -> dict[str, Any]:
        """The answer when its sequence has ended."""
        (events,) = [[*self._put(output)] async for _, output in sequences.outputs()]
        answer: dict[str, Any] = events[-1]["response"]
        return answer

    async def events(self, sequences: Sequences) -> AsyncIterator[str]:
        """The events of a stream."""
        try:
            for kind in ("created", "in_progress"):
                yield event_line(self._response(kind, "in_progress"))
            async for _, output in sequences.outputs():
                if events := [*self._put(output)]:
                    yield "".join(map(event_line, events))
        except LorafxError as error:
            why = {"code": "server_error", "message": message_of(error)}
            yield event_line(self._items.event("error", **why, param=None))
            ended = [*self._items.end("incomplete"), self._response("failed", error=why)]
            yield "".join(map(event_line, ended))

    def _put(self, output: SequenceOutput) -> Iterator[_Event]:
        """The events that are new after an output."""
        self._head |= versions_of(output)
        for part in self._sequence.put(output):
            yield from self._items.put(part)
        if not output.is_finished():
            return
        status = "completed" if output.finish_reason == "stop" else "incomplete"
        cut = output.finish_reason == "length"
        yield from self._items.end_all(status)
        yield self._response(
            status,
            usage=self._usage(),
            incomplete_details={"reason": "max_output_tokens"} if cut else None,
        )

    def _response(self, kind: str, status: str = "", **fields: Any) -> _Event:
        """The event of a response that is `kind`, which is its `status` unless that is another."""
        state = {"status": status or kind, "output": [*self._items.output]}
        return self._items.event(f"response.{kind}", response={**self._head, **state, **fields})

    def _usage(self) -> dict[str, Any]:
        prompt, new = self._sequence.prompt_tokens, self._sequence.text.count
        return {
            "input_tokens": prompt,
            "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
            "output_tokens": new,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": prompt + new,
        }


def event_line(event: dict[str, Any]) -> str:
    """An event as server-sent events have it."""
    return f"event: {event['type']}\ndata: {json.dumps(event, ensure_ascii=False)}\n\n"
