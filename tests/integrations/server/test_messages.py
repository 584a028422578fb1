"""/v1/messages as Anthropic's SDK reads it: each event and answer is of its types, its accumulator
takes any stream, and blocks of a turn go into the prompt as they came."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import anthropic
import pytest
from anthropic.types import Message, MessageTokensCount, RawMessageStreamEvent
from pydantic import TypeAdapter
from served import anew, ask, client_of, events
from spoken import GOOD, SHOWN, TOOLS, answers, call

from lorafx.integrations.server.anthropic import AnthropicFields
from lorafx.integrations.server.errors import RequestError
from lorafx.integrations.server.fields import ChatFields, GrammarSource

PATH = "/v1/messages"
EVENT = TypeAdapter(RawMessageStreamEvent)
ASKED = {"max_tokens": 300, "messages": [{"role": "user", "content": "a"}]}
TOOL = {"name": "f", "input_schema": {"type": "object"}}
THINKS = "<think>hm</think>"
CALLED = ("tool_use", {"x": 1})
#: Answers, and the types and contents of their blocks.
ANSWERS = {
    "so it is": [("text", "so it is")],
    "": [],
    f"{THINKS}well": [("thinking", "hm"), ("text", "well")],
    f"{THINKS}{call(GOOD)}": [("thinking", "hm"), CALLED],
    f"so{call(GOOD)}{call(GOOD)}then": [("text", "so"), CALLED, CALLED, ("text", "then")],
    call("{"): [("text", call("{"))],
}


@pytest.fixture
def says(monkeypatch):
    """Have all chats say a text."""

    def force(text: str) -> None:
        source = GrammarSource("text", "choice", [text])
        monkeypatch.setattr(ChatFields, "grammar", lambda fields: source)

    return force


def shown(block: dict[str, Any]) -> tuple[str, Any]:
    return block["type"], block["input" if block["type"] == "tool_use" else block["type"]]


def both(server, **fields: Any) -> Message:
    """A message, plain, which is the same as a stream."""
    body = {**ASKED, **fields}
    plain, stream = answers(server, [body, {**body, "stream": True}], PATH)
    assert plain.status_code == 200, plain.text
    found = events(stream.text)
    assert stream.text.count("event: ") == len(found)
    for event in found:
        assert EVENT.validate_python(event).type == event["type"]
    began, *found, ended, stopped = found
    assert (began["type"], stopped["type"]) == ("message_start", "message_stop")
    assert (began["message"]["content"], began["message"]["usage"]["output_tokens"]) == ([], 0)
    blocks: list[dict[str, Any]] = []
    for event in found:
        assert event["index"] == len(blocks) - (event["type"] != "content_block_start")
        if event["type"] == "content_block_start":
            blocks.append({**event["content_block"], "json": ""})
        elif event["type"] == "content_block_delta":
            kind, text = event["delta"].values()
            place = "json" if kind == "input_json_delta" else kind.removesuffix("_delta")
            blocks[-1][place] += text
        else:
            blocks[-1]["input"] = json.loads(blocks[-1].pop("json") or "{}")
    message = Message.model_validate(plain.json())
    want = [*map(shown, plain.json()["content"])]
    assert [*map(shown, blocks)] == want
    for name, value in ended["delta"].items():
        assert getattr(message, name) == value
    assert plain.json()["usage"] == ended["usage"]
    return message


@pytest.mark.parametrize("text", ANSWERS)
def test_blocks_of_a_message(spoken, says, text):
    says(text)
    message = both(spoken(), tools=[TOOL])
    assert [shown(block.to_dict()) for block in message.content] == ANSWERS[text]
    called = CALLED in ANSWERS[text]
    assert message.stop_reason == ("tool_use" if called else "end_turn")
    assert (message.model, message.stop_sequence) == ("tiny", None)


@pytest.mark.parametrize("text", ANSWERS)
def test_the_stream_of_the_sdk(spoken, says, text):
    says(text)
    server = spoken()

    async def talk() -> Any:
        async with client_of(server) as http:
            client = anthropic.AsyncAnthropic(base_url="http://test", api_key="x", http_client=http)
            counted = {"messages": ASKED["messages"], "model": "tiny", "tools": [TOOL]}
            count = await client.messages.count_tokens(**counted)
            async with client.messages.stream(**counted, max_tokens=300) as stream:
                return count, await stream.get_final_message()

    count, message = asyncio.run(talk())
    assert [shown(block.to_dict()) for block in message.content] == ANSWERS[text]
    assert count.input_tokens == message.usage.input_tokens


def test_why_a_message_ends(spoken, says):
    says("so it is")
    server = spoken()
    cut = both(server, max_tokens=3)
    assert (cut.stop_reason, cut.content[0].text, cut.usage.output_tokens) == (
        "max_tokens",
        "so ",
        3,
    )
    stopped = both(server, stop_sequences=["it", "x"])
    assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", "it")
    assert stopped.content[0].text == "so "


def test_a_message_that_ends_with_the_context(server):
    body = {**ASKED, "max_tokens": 900, "ignore_eos": True}
    answer = ask(server, "POST", PATH, model="tiny", **body).json()
    assert answer["stop_reason"] == "model_context_window_exceeded"


CALL = {"type": "tool_use", "id": "c", "name": "f", "input": {"x": 1}}
RESULT = {"type": "tool_result", "tool_use_id": "c", "content": "1"}
THOUGHT = {"type": "thinking", "thinking": "hm", "signature": ""}
MADE = {"id": "c", "type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
HM = {"reasoning_content": "hm", "reasoning": "hm"}
FOUND = {"role": "tool", "tool_call_id": "c", "content": "1"}


def text(said: str) -> dict[str, str]:
    return {"type": "text", "text": said}


def turn(role: str, *content: Any) -> dict[str, Any]:
    return {"role": role, "content": [*content]}


def said(role: str, content: str, **others: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **others}


TURNS = [
    ([said("user", "a")], [said("user", "a")]),
    ([turn("user", text("a"), text("b"))], [said("user", "a\nb")]),
    (
        [turn("assistant", THOUGHT, text("so"), CALL), turn("user", RESULT, text("b"))],
        [said("assistant", "so", **HM, tool_calls=[MADE]), FOUND, said("user", "b")],
    ),
    (
        [turn("assistant", CALL, CALL), turn("user", RESULT, RESULT)],
        [said("assistant", "", tool_calls=[MADE, MADE]), FOUND, FOUND],
    ),
    (
        [turn("assistant", {"type": "redacted_thinking", "data": "x"}, text("so"))],
        [said("assistant", "so")],
    ),
    ([turn("user", {**RESULT, "content": [text("1")], "is_error": False})], [FOUND]),
    ([turn("user", {**text("a"), "cache_control": {"type": "ephemeral"}})], [said("user", "a")]),
]


@pytest.mark.parametrize(("messages", "want"), TURNS)
def test_turns(messages, want):
    made = AnthropicFields.read({"messages": messages, "system": [text("s")]}).as_chat()
    assert made["messages"] == [said("system", "s"), *want]
    assert made["continue_final_message"] == (want[-1]["role"] == "assistant")


def test_other_fields():
    def chat(**fields: Any) -> ChatFields:
        return ChatFields.read(AnthropicFields.read({**ASKED, **fields}).as_chat())

    asked = {"temperature": 0.5, "top_p": 0.5, "top_k": 3, "metadata": {"user_id": "me"}}
    assert chat(**asked).choosing == {n: v for n, v in asked.items() if n != "metadata"}
    tools = {"tools": [{**TOOL, "type": "custom", "description": "d"}]}
    assert chat(**tools).used_tools == [
        {"type": "function", "function": {**TOOLS[0]["function"], "description": "d"}}
    ]
    assert chat(**tools, tool_choice={"type": "none"}).used_tools is None
    one = chat(**tools, tool_choice={"type": "auto", "disable_parallel_tool_use": True})
    assert not one.parallel_tool_calls
    schema = {"type": "json_schema", "schema": {"type": "object"}}
    assert chat(output_config={"format": schema}).grammar().value == {"type": "object"}
    for wrong in (
        *({"thinking": {"type": "enabled", "budget_tokens": 1024}}, {"mcp_servers": [{}]}),
        *({"output_config": {"effort": "high"}}, {"container": "c"}, {"stop_sequences": "a"}),
        *({"tools": [{"type": "web_search_20250305", "name": "w"}]}, {"tools": [{}]}),
        *({"tool_choice": {"type": "all"}}, {"max_tokens": 0}, {"messages": []}, {"system": 3}),
        *({"tool_choice": {"type": kind}} for kind in ([], {}, 3)),
        *({"messages": [turn("user", block)]} for block in ({"type": "image"}, 3, {}, [])),
        *({"messages": [turn("user", {**CALL, "input": 3})]}, {"messages": [{"content": "a"}]}),
    ):
        with pytest.raises(RequestError):
            chat(**wrong)


def test_a_message_that_is_continued(spoken, says):
    """The answer begins after what the assistant has said."""
    says(" it is")
    shows = "{% for m in messages %}{{ m.content }}{% endfor %}"
    begun = [*ASKED["messages"], said("assistant", "so")]
    message = both(spoken(shows), messages=begun)
    assert message.content[0].text == " it is"
    assert message.usage.input_tokens == len("aso")


def test_a_message_as_the_next_turn(spoken, says):
    """What Anthropic's client sends back of it."""
    says(f"{THINKS}so{call(GOOD)}")
    server = spoken(f"{SHOWN}|")
    message = both(server, tools=[TOOL])
    called = message.content[2].id
    turns = [*ASKED["messages"], {"role": "assistant", "content": message.to_dict()["content"]}]
    turns.append(turn("user", {**RESULT, "tool_use_id": called}))
    want = [
        said("user", "a"),
        said("assistant", "so", **HM, tool_calls=[{**MADE, "id": called}]),
        {**FOUND, "tool_call_id": called},
    ]
    assert AnthropicFields.read({"messages": turns}).as_chat()["messages"] == want
    body = {"messages": turns, "tools": [TOOL]}
    count = ask(server, "POST", f"{PATH}/count_tokens", model="tiny", **body).json()
    chat = ask(server, "POST", "/tokenize", model="tiny", messages=want, tools=TOOLS).json()
    assert MessageTokensCount.model_validate(count).input_tokens == chat["count"]


def test_errors_and_keys(files, server, spoken, monkeypatch):
    async def talk(app: Any, key: str, **fields: Any) -> Any:
        async with client_of(app) as http:
            given = {"base_url": "http://test", "http_client": http, "max_retries": 0}
            client = anthropic.AsyncAnthropic(api_key=key, **given)
            return await client.messages.create(**{**ASKED, "model": "tiny", **fields})

    locked = anew(server, files, api_key="secret")
    assert asyncio.run(talk(locked, "secret", max_tokens=2)).usage.output_tokens <= 2
    with pytest.raises(anthropic.AuthenticationError, match="not this server's"):
        asyncio.run(talk(locked, "other"))
    with pytest.raises(anthropic.NotFoundError, match="nearest"):
        asyncio.run(talk(server, "", model="tiny:a7"))
    with pytest.raises(anthropic.BadRequestError, match="thinking"):
        asyncio.run(talk(server, "", thinking={"type": "enabled", "budget_tokens": 1024}))

    async def outputs(sequences: Any) -> Any:
        raise RequestError("the generation failed: no", status=500)
        yield

    monkeypatch.setattr("lorafx.integrations.server.generating.Sequences.outputs", outputs)
    streamed = ask(server, "POST", PATH, model="tiny", **ASKED, stream=True).text
    assert [event["type"] for event in events(streamed)] == ["message_start", "error"]


@pytest.mark.parametrize("choice", [{"type": "any"}, {"type": "tool", "name": "f"}])
def test_a_call_that_is_forced(spoken, choice):
    one = {"properties": {"x": {"const": 1}}, "required": ["x"], "additionalProperties": False}
    tools = [{**TOOL, "input_schema": {"type": "object", **one}}]
    choice = {**choice, "disable_parallel_tool_use": True}
    message = both(spoken(), tools=tools, tool_choice=choice)
    assert [shown(block.to_dict()) for block in message.content] == [CALLED]
    assert message.stop_reason == "tool_use"
