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
from typing import Any
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
#: Types of items that have a text: how their IDs begin, their other fields, and those of its part.
_ITEMS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "message": (
        "msg",
        {"role": "assistant"},
        {"type": "output_text", "annotations": [], "logprobs": []},
    ),
    "reasoning": ("rs", {"summary": []}, {"type": "reasoning_text"}),
}


class ResponseAnswer:
    """An answer of /v1/responses, whose last event has all of it. Events are read before the next
    one is made, which changes their items."""

    def __init__(
        self, fields: ResponseFields, sequence: MessageSequence, name: str, model: str
    ) -> None:
        self._sequence = sequence
        head = {"id": f"resp_{name}", "object": "response", "created_at": int(time.time())}
        nothing = {"error": None, "incomplete_details": None, "usage": None}
        self._head = {**head, "model": model, **nothing, **fields.echoed()}
        #: The items so far, of which the last may be in progress.
        self._output: list[dict[str, Any]] = []
        self._count = 0

    async def whole(self, sequences: Sequences) -> dict[str, Any]:
        """The answer when its sequence has ended."""
        async for _, output in sequences.outputs():
            *_, last = self._put(output)
        answer: dict[str, Any] = last["response"]
        return answer

    async def events(self, sequences: Sequences) -> AsyncIterator[str]:
        """The events of a stream."""
        try:
            for kind in ("created", "in_progress"):
                yield event_line(self._response(kind, "in_progress"))
            async for _, output in sequences.outputs():
                if lines := "".join(map(event_line, self._put(output))):
                    yield lines
        except LorafxError as error:
            why = {"code": "server_error", "message": message_of(error)}
            yield event_line(self._event("error", **why, param=None))
            ended = [*self._end("incomplete"), self._response("failed", error=why)]
            yield "".join(map(event_line, ended))

    def _put(self, output: SequenceOutput) -> Iterator[_Event]:
        """The events that are new after an output."""
        self._head |= versions_of(output)
        for part in self._sequence.put(output):
            yield from self._call(part) if isinstance(part, ToolCall) else self._add(part)
        if not output.is_finished():
            return
        if not self._output:  # an answer has at least one item
            yield from self._begin("message")
        status = "completed" if output.finish_reason == "stop" else "incomplete"
        cut = output.finish_reason == "length"
        yield from self._end(status)
        yield self._response(
            status,
            usage=self._usage(),
            incomplete_details={"reason": "max_output_tokens"} if cut else None,
        )

    def _add(self, text: str) -> Iterator[_Event]:
        kind = "reasoning" if isinstance(text, ReasoningText) else "message"
        if not self._output or self._output[-1]["type"] != kind:
            yield from self._end()
            yield from self._begin(kind)
        self._output[-1]["content"][0]["text"] += text
        yield self._of_text("delta", delta=text)

    def _begin(self, kind: str) -> Iterator[_Event]:
        prefix, item, part = _ITEMS[kind]
        name = f"{prefix}_{uuid4().hex}"
        self._output.append({"type": kind, "id": name, **item, "content": []})
        yield self._of_item("added", "in_progress")
        part = {"text": "", **part}
        self._output[-1]["content"] = [part]
        yield self._in_item("content_part.added", content_index=0, part=part)

    def _end(self, status: str = "completed") -> Iterator[_Event]:
        """End the item that is in progress, if one is."""
        if self._output and self._output[-1]["status"] == "in_progress":
            (part,) = self._output[-1]["content"]
            yield self._of_text("done", text=part["text"])
            yield self._in_item("content_part.done", content_index=0, part=part)
            yield self._of_item("done", status)

    def _call(self, call: ToolCall) -> Iterator[_Event]:
        yield from self._end()
        ids = {"id": f"fc_{uuid4().hex}", "call_id": f"call_{uuid4().hex}"}
        self._output.append({"type": "function_call", **ids, "name": call.name, "arguments": ""})
        yield self._of_item("added", "in_progress")
        said, kind = {"name": call.name, "arguments": call.arguments}, "function_call_arguments"
        yield self._in_item(f"{kind}.delta", delta=call.arguments)
        yield self._in_item(f"{kind}.done", **said)
        self._output[-1] |= said
        yield self._of_item("done", "completed")

    def _event(self, kind: str, **fields: Any) -> _Event:
        """The next event of the stream."""
        self._count += 1
        return {"type": kind, "sequence_number": self._count - 1, **fields}

    def _response(self, kind: str, status: str = "", **fields: Any) -> _Event:
        """The event of a response that is `kind`, which is its `status` unless that is another."""
        state = {"status": status or kind, "output": self._output}
        return self._event(f"response.{kind}", response={**self._head, **state, **fields})

    def _of_item(self, kind: str, status: str) -> _Event:
        """An event of the last item, which has this `status` from now on."""
        item, place = self._output[-1], len(self._output) - 1
        item["status"] = status
        return self._event(f"response.output_item.{kind}", output_index=place, item=item)

    def _in_item(self, kind: str, **fields: Any) -> _Event:
        """An event of what is in the last item."""
        place = {"item_id": self._output[-1]["id"], "output_index": len(self._output) - 1}
        return self._event(f"response.{kind}", **place, **fields)

    def _of_text(self, kind: str, **text: str) -> _Event:
        (part,) = self._output[-1]["content"]
        logprobs: dict[str, Any] = {"logprobs": []} if part["type"] == "output_text" else {}
        return self._in_item(f"{part['type']}.{kind}", content_index=0, **text, **logprobs)

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
