"""Anthropic's SDK for Python, over /v1/messages."""

from __future__ import annotations

from functools import partial

import anthropic
from client_checks import (
    CALL,
    CITIES,
    FUNCTION,
    GREET,
    GREETING,
    KEY,
    MODEL,
    PARAMETERS,
    RECALL,
    SERVER,
    SUNNY,
    Report,
    recalls,
    report,
    same,
    streamed,
    user,
)

messages = anthropic.Anthropic(base_url=SERVER, api_key=KEY).messages
ask = partial(messages.create, model=MODEL, max_tokens=500)
TOOL = {"name": "weather", "description": FUNCTION["description"], "input_schema": PARAMETERS}


def text():
    made = ask(messages=[user(GREET)])
    same((made.content[0].text, made.stop_reason), (GREETING, "end_turn"))


def stream():
    with messages.stream(model=MODEL, max_tokens=500, messages=[user(GREET)]) as events:
        streamed([*events.text_stream])
    asked = {"messages": [user(CALL)], "tools": [TOOL]}
    with messages.stream(model=MODEL, max_tokens=500, **asked) as events:
        (block,) = events.get_final_message().content
    same(block.input, {"city": "Oslo"})


def tools():
    made = ask(messages=[user(CALL)], tools=[TOOL])
    (block,) = made.content
    same((block.name, block.input, made.stop_reason), ("weather", {"city": "Oslo"}, "tool_use"))


def forced():
    for choice in ({"type": "any"}, {"type": "tool", "name": "weather"}):
        made = ask(messages=[user(GREET)], tools=[TOOL], tool_choice=choice)
        assert made.content[0].input["city"] in CITIES


def structured():
    asked = {"messages": [user(GREET)], "output_format": Report}
    made = messages.parse(model=MODEL, max_tokens=500, **asked)
    assert isinstance(made.parsed_output, Report)


def second():
    first = ask(messages=[user(GREET)])
    turns = [user(GREET), {"role": "assistant", "content": first.content}, user(RECALL)]
    recalls(ask(messages=turns).content[0].text)
    called = ask(messages=[user(CALL)], tools=[TOOL])
    name = called.content[0].id
    result = [{"type": "tool_result", "tool_use_id": name, "content": SUNNY}]
    turns = [user(CALL), {"role": "assistant", "content": called.content}, user(result)]
    same(ask(messages=turns, tools=[TOOL]).content[0].text, f"It says: {SUNNY}")


report("anthropic (Python), messages", "anthropic", globals())
