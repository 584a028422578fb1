"""Messages of requests, in the form that chat templates take."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from lorafx.integrations.server.errors import RequestError
from lorafx.integrations.server.media import KINDS, Media

#: The parts of a message with text.
_TEXT_PARTS = ("text", "input_text", "output_text")
#: The parts of an item with reasoning.
_REASONING_PARTS = ("reasoning_text", "summary_text")
#: What a message of an assistant has, in this order.
_IN_ORDER = ("reasoning", "content", "tool_calls")
#: What a template gets of a message as it was sent, beside its role.
_TEXTS = ("name", "tool_call_id", "reasoning_content", "reasoning")


def text_messages(messages: Any, media: Media | None = None) -> list[dict[str, Any]]:
    """A request's messages as chat templates take them: contents are strings, or lists of parts if
    `media` reads some of them, arguments of calls are objects, and what is null was not sent.
    Raises RequestError for parts of other types."""
    if not isinstance(messages, list) or not messages:
        raise RequestError("`messages` is a list of messages, at least one", "messages")
    return [
        _text_message(message, None if media is None else partial(_read, media, index))
        for index, message in enumerate(messages)
    ]


def input_messages(asked: Any) -> list[dict[str, Any]]:
    """The messages of a chat that the `input` of a response is, as of `text_messages`. What an
    assistant thinks, says and calls, in this order, is one message. Raises RequestError for
    items of other types, or without text."""
    items = [{"role": "user", "content": asked}] if isinstance(asked, str) else asked
    if not isinstance(items, list) or not items:
        raise RequestError("`input` is a string or a list of items, at least one", "input")
    messages = list[dict[str, Any]]()
    for message in map(_text_message, map(_of_item, items)):
        if messages and _is_one(messages[-1], message):
            calls = [*messages[-1].get("tool_calls", ()), *message.get("tool_calls", ())]
            messages[-1] |= {name: value for name, value in message.items() if value}
            messages[-1] |= {"tool_calls": calls} if calls else {}
        else:
            messages.append(message)
    return messages


def _is_one(before: dict[str, Any], message: dict[str, Any]) -> bool:
    """Whether a message of an assistant goes on with what was `before`."""
    had, new = (
        [place for place, name in enumerate(_IN_ORDER) if each.get(name)]
        for each in (before, message)
    )
    goes_on = max(had, default=-1) < min(new, default=3) or had[-1:] == new == [2]
    return before["role"] == message["role"] == "assistant" and goes_on


def _of_item(item: Any) -> dict[str, Any]:
    """The message that an item of an `input` is, or is a part of."""
    kind = item.get("type") if isinstance(item, dict) else None
    if isinstance(item, dict) and "role" in item and kind in (None, "message"):
        return item
    if kind == "reasoning":
        text = _text(item.get("content") or item.get("summary") or "", _REASONING_PARTS)
        return {"role": "assistant", "reasoning_content": text or None}
    if kind == "function_call":
        function = {name: item.get(name) for name in ("name", "arguments")}
        call = {"id": item.get("call_id"), "type": "function", "function": function}
        return {"role": "assistant", "tool_calls": [call]}
    if kind == "function_call_output":
        called = {"tool_call_id": item.get("call_id")}
        return {"role": "tool", **called, "content": item.get("output")}
    if kind == "item_reference":
        raise RequestError(
            "nothing is stored here that an item_reference could name; send the item itself, as "
            "clients do with `store: false`",
            "input",
        )
    raise RequestError(
        "an item of `input` is a message with a `role`, or has the type reasoning, function_call "
        f"or function_call_output; got {kind or item!r:.80}",
        "input",
    )


def _read(media: Media, index: int, content: Any) -> Any:
    """The content of the message `index` for the template: a string unless it has media."""
    parts = content if isinstance(content, list) else ()
    kinds = [part.get("type") if isinstance(part, dict) else None for part in parts]
    read = []
    for number, (part, kind) in enumerate(zip(parts, kinds, strict=True)):
        place = f"messages[{index}].content[{number}]"
        if isinstance(kind, str) and kind in KINDS:
            read.append(media.part(part, place))
        elif kind not in _TEXT_PARTS or not isinstance(part.get("text"), str):
            known = ", ".join((*_TEXT_PARTS, *KINDS))
            raise RequestError(
                f"{place}: a part has one of the types {known}; got {kind or part!r:.80}", place
            )
        else:
            read.append({"type": "text", "text": part["text"]})
    return read if any(part["type"] != "text" for part in read) else _text(content)


def _text_message(message: Any, content: Callable[[Any], Any] | None = None) -> dict[str, Any]:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise RequestError(f"a message is an object with a `role`; got {message!r:.80}")
    sent = {name: value for name, value in message.items() if value is not None}
    made = {"role": sent["role"], "content": (content or _text)(sent.get("content", ""))}
    for name in _TEXTS:
        if name in sent and not isinstance(sent[name], str):
            raise RequestError(f"the `{name}` of a message is a string; got {sent[name]!r:.80}")
    made |= {name: sent[name] for name in _TEXTS if name in sent}
    # Templates read the one or the other; vLLM, too, sends both.
    reasoning = made.get("reasoning_content") or made.get("reasoning")
    made |= {"reasoning_content": reasoning, "reasoning": reasoning} if reasoning else {}
    calls = sent.get("tool_calls", [])
    if not isinstance(calls, list):
        raise RequestError(f"the `tool_calls` of a message are a list; got {calls!r:.80}")
    return {**made, "tool_calls": [*map(_call, calls)]} if calls else made


def _text(content: Any, kinds: Sequence[str] = _TEXT_PARTS) -> str:
    """The text of a content, whose parts are lines of their own, as with other servers."""
    if isinstance(content, str):
        return content
    texts = []
    for part in content if isinstance(content, list) else [content]:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind not in kinds or not isinstance(part.get("text"), str):
            raise RequestError(
                "the content of a message is text: a string, or parts of the types "
                f"{', '.join(kinds)}; got {kind or part!r:.80}"
            )
        texts.append(part["text"])
    return "\n".join(texts)


def _call(call: Any) -> dict[str, Any]:
    function = (call.get("function") or call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise RequestError(
            f"an entry of a message's `tool_calls` has a `function` with a `name`; got {call!r:.80}"
        )
    arguments = function.get("arguments") or {}
    try:
        if isinstance(arguments, str):
            arguments = json.loads(arguments) if arguments.strip() else {}
        json.dumps(arguments, ensure_ascii=False).encode()  # half of a surrogate pair is no text
        if not isinstance(arguments, dict):
            raise ValueError("they are no object")
    except (RecursionError, ValueError) as error:
        raise RequestError(
            "the `arguments` of a message's `tool_calls` are an object, or the JSON of one; got "
            f"{arguments!r:.80}"
        ) from error
    made = {"name": function["name"], "arguments": arguments}
    kept = {name: call[name] for name in ("id", "type") if call.get(name) is not None}
    return {**kept, **(made if function is call else {"function": made})}
