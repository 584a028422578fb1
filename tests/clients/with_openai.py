"""OpenAI's SDK for Python: chats, with its helpers for streams and for parsing, and responses."""

from __future__ import annotations

import json

from client_checks import (
    CALL,
    CITIES,
    FUNCTION,
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
from openai import OpenAI

client = OpenAI(base_url=URL, api_key=KEY)
chat, responses = client.chat.completions, client.responses
FLAT = {"type": "function", **FUNCTION}


def text():
    made = chat.create(model=MODEL, messages=[user(GREET)])
    same(made.choices[0].message.content, GREETING)
    same(made.choices[0].finish_reason, "stop")
    assert made.usage.completion_tokens > len(GREETING)


def stream():
    chunks = chat.create(model=MODEL, messages=[user(GREET)], stream=True)
    streamed([chunk.choices[0].delta.content or "" for chunk in chunks])
    with chat.stream(model=MODEL, messages=[user(CALL)], tools=[TOOL]) as events:
        (call,) = events.get_final_completion().choices[0].message.tool_calls
    same(json.loads(call.function.arguments), {"city": "Oslo"})


def tools():
    made = chat.create(model=MODEL, messages=[user(CALL)], tools=[TOOL])
    (call,) = made.choices[0].message.tool_calls
    same((call.function.name, json.loads(call.function.arguments)), ("weather", {"city": "Oslo"}))
    same(made.choices[0].finish_reason, "tool_calls")


def forced():
    named = {"type": "function", "function": {"name": "weather"}}
    for choice in ("required", named):
        made = chat.create(model=MODEL, messages=[user(GREET)], tools=[TOOL], tool_choice=choice)
        for call in made.choices[0].message.tool_calls:
            assert json.loads(call.function.arguments)["city"] in CITIES


def structured():
    made = chat.parse(model=MODEL, messages=[user(GREET)], response_format=Report)
    assert isinstance(made.choices[0].message.parsed, Report)


def second():
    first = chat.create(model=MODEL, messages=[user(GREET)]).choices[0].message
    turns = [user(GREET), first, user(RECALL)]
    recalls(chat.create(model=MODEL, messages=turns).choices[0].message.content)
    called = chat.parse(model=MODEL, messages=[user(CALL)], tools=[strict()]).choices[0].message
    result = {"role": "tool", "tool_call_id": called.tool_calls[0].id, "content": SUNNY}
    turns = [user(CALL), called.model_dump(), result]
    made = chat.create(model=MODEL, messages=turns, tools=[TOOL])
    same(made.choices[0].message.content, f"It says: {SUNNY}")


def strict():
    return {"type": "function", "function": {**FUNCTION, "strict": True}}


def response_text():
    same(responses.create(model=MODEL, input=GREET).output_text, GREETING)


def response_stream():
    events = [*responses.create(model=MODEL, input=GREET, stream=True)]
    streamed([e.delta for e in events if e.type == "response.output_text.delta"])
    with responses.stream(model=MODEL, input=CALL, tools=[FLAT]) as stream:
        for _ in stream:
            pass
        (call,) = stream.get_final_response().output
    same(json.loads(call.arguments), {"city": "Oslo"})


def response_tools():
    (call,) = responses.create(model=MODEL, input=CALL, tools=[FLAT]).output
    same((call.name, json.loads(call.arguments)), ("weather", {"city": "Oslo"}))


def response_forced():
    for choice in ("required", {"type": "function", "name": "weather"}):
        made = responses.create(model=MODEL, input=GREET, tools=[FLAT], tool_choice=choice)
        for call in made.output:
            assert json.loads(call.arguments)["city"] in CITIES


def response_structured():
    made = responses.parse(model=MODEL, input=GREET, text_format=Report)
    assert isinstance(made.output_parsed, Report)


def response_second():
    first = responses.create(model=MODEL, input=GREET)
    recalls(
        responses.create(model=MODEL, input=[user(GREET), *first.output, user(RECALL)]).output_text
    )
    (call,) = responses.create(model=MODEL, input=CALL, tools=[FLAT]).output
    result = {"type": "function_call_output", "call_id": call.call_id, "output": SUNNY}
    made = responses.create(model=MODEL, input=[user(CALL), call, result], tools=[FLAT])
    same(made.output_text, f"It says: {SUNNY}")


report("openai (Python), chat", "openai", globals())
report("openai (Python), responses", "openai", globals(), "response_")
