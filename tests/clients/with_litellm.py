"""litellm, by its provider `openai`."""

from __future__ import annotations

import json
from functools import partial

import litellm
from client_checks import (
    CALL,
    CITIES,
    GREET,
    GREETING,
    KEY,
    MODEL,
    RECALL,
    SUNNY,
    TOOL,
    URL,
    Report,
    recalls,
    report,
    same,
    streamed,
    user,
)

ask = partial(litellm.completion, model=f"openai/{MODEL}", api_base=URL, api_key=KEY)


def text():
    same(ask(messages=[user(GREET)]).choices[0].message.content, GREETING)


def stream():
    chunks = ask(messages=[user(GREET)], stream=True)
    streamed([chunk.choices[0].delta.content or "" for chunk in chunks])
    chunks = [*ask(messages=[user(CALL)], tools=[TOOL], stream=True)]
    (call,) = litellm.stream_chunk_builder(chunks).choices[0].message.tool_calls
    same(json.loads(call.function.arguments), {"city": "Oslo"})


def tools():
    (call,) = ask(messages=[user(CALL)], tools=[TOOL]).choices[0].message.tool_calls
    same((call.function.name, json.loads(call.function.arguments)), ("weather", {"city": "Oslo"}))


def forced():
    for choice in ("required", {"type": "function", "function": {"name": "weather"}}):
        made = ask(messages=[user(GREET)], tools=[TOOL], tool_choice=choice)
        (call,) = made.choices[0].message.tool_calls
        assert json.loads(call.function.arguments)["city"] in CITIES


def structured():
    made = ask(messages=[user(GREET)], response_format=Report)
    Report.model_validate_json(made.choices[0].message.content)


def second():
    first = ask(messages=[user(GREET)]).choices[0].message
    made = ask(messages=[user(GREET), first, user(RECALL)])
    recalls(made.choices[0].message.content)
    called = ask(messages=[user(CALL)], tools=[TOOL]).choices[0].message
    result = {"role": "tool", "tool_call_id": called.tool_calls[0].id, "content": SUNNY}
    made = ask(messages=[user(CALL), called, result], tools=[TOOL])
    same(made.choices[0].message.content, f"It says: {SUNNY}")


report("litellm", "litellm", globals())
