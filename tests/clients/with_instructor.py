"""instructor, in its modes of calls and of JSON schemas."""

from __future__ import annotations

import instructor
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
    user,
)
from openai import OpenAI

openai = OpenAI(base_url=URL, api_key=KEY)
by_calls = instructor.from_openai(openai).chat.completions
by_schema = instructor.from_openai(openai, mode=instructor.Mode.JSON_SCHEMA).chat.completions


def create(*messages, response_model=None, made_by=by_calls, **fields):
    asked = {"model": MODEL, "messages": [*messages], "max_retries": 0, **fields}
    return made_by.create(response_model=response_model, **asked)


def text():
    same(create(user(GREET)).choices[0].message.content, GREETING)


def stream():
    for made_by in (by_calls, by_schema):
        asked = {"model": MODEL, "messages": [user(GREET)], "response_model": Report}
        *before, last = made_by.create_partial(**asked)
        assert before or made_by is by_calls  # a call comes whole
        assert last.city in CITIES


def tools():
    (call,) = create(user(CALL), tools=[TOOL]).choices[0].message.tool_calls
    same(call.function.name, "weather")


def forced():
    assert isinstance(create(user(GREET), response_model=Report), Report)
    found = create(user(GREET), response_model=list[Report])
    assert found or found == []


def structured():
    assert isinstance(create(user(GREET), response_model=Report, made_by=by_schema), Report)


def second():
    first = create(user(GREET)).choices[0].message.model_dump()
    recalls(create(user(GREET), first, user(RECALL)).choices[0].message.content)
    called = create(user(CALL), tools=[TOOL]).choices[0].message.model_dump()
    result = {"role": "tool", "tool_call_id": called["tool_calls"][0]["id"], "content": SUNNY}
    made = create(user(CALL), called, result, tools=[TOOL])
    same(made.choices[0].message.content, f"It says: {SUNNY}")


report("instructor", "instructor", globals())
