"""Messages of requests, in the form that chat templates take."""

from __future__ import annotations

import json
from typing import Any

from lorafx.integrations.server.errors import RequestError

TEXT_PARTS = ("text", "input_text", "output_text")
#: What a template gets of a message as it was sent, beside its role.
_TEXTS = ("name", "tool_call_id", "reasoning_content", "reasoning")


def text_messages(messages: Any) -> list[dict[str, Any]]:
    """A request's messages as chat templates take them: contents are strings, arguments of calls
    are objects, and what is null was not sent. Raises RequestError unless they are text."""
    if not isinstance(messages, list) or not messages:
        raise RequestError("`messages` is a list of messages, at least one", "messages")
    return [_text_message(message) for message in messages]


def _text_message(message: Any) -> dict[str, Any]:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise RequestError(f"a message is an object with a `role`; got {message!r:.80}")
    sent = {name: value for name, value in message.items() if value is not None}
    made = {"role": sent["role"], "content": _text(sent.get("content", ""))}
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


def _text(content: Any) -> str:
    """The text of a content, whose parts are lines of their own, as with other servers."""
    if isinstance(content, str):
        return content
    texts = []
    for part in content if isinstance(content, list) else [content]:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind not in TEXT_PARTS or not isinstance(part.get("text"), str):
            raise RequestError(
                "the content of a message is text: a string, or parts of the types "
                f"{', '.join(TEXT_PARTS)}; got {kind or part!r:.80}"
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
    except (RecursionError, ValueError) as error:
        raise _no_arguments(arguments) from error
    if not isinstance(arguments, dict):
        raise _no_arguments(arguments)
    made = {"name": function["name"], "arguments": arguments}
    kept = {name: call[name] for name in ("id", "type") if call.get(name) is not None}
    return {**kept, **(made if function is call else {"function": made})}


def _no_arguments(arguments: Any) -> RequestError:
    return RequestError(
        "the `arguments` of a message's `tool_calls` are an object, or the JSON of one; got "
        f"{arguments!r:.80}"
    )
