"""/v1/responses as OpenAI's SDK reads it: each event and answer is of its types, its accumulator
takes any stream, and items of a turn go back into the prompt as they came."""

from __future__ import annotations

import asyncio
from typing import Any

import openai
import pytest
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter
from served import ask, client_of, events, question
from spoken import GOOD, RESPONSES, SHOWN, TOOLS, answers, call

from lorafx.integrations.server.errors import RequestError
from lorafx.integrations.server.fields import GrammarSource, ResponseFields
from lorafx.integrations.server.messages import text_messages

EVENT = TypeAdapter(ResponseStreamEvent)
FLAT = [{"type": "function", **TOOLS[0]["function"]}]
THINKS = "<think>hm</think>"
CALLS = ("function_call", '{"x": 1}')
#: Answers, and the types and texts of their items.
ANSWERS = {
    "so it is": [("message", "so it is")],
    "": [("message", "")],
    f"{THINKS}well": [("reasoning", "hm"), ("message", "well")],
    "<think>hm": [("reasoning", "hm")],
    f"{THINKS}{call(GOOD)}": [("reasoning", "hm"), CALLS],
    call(GOOD): [CALLS],
    f"so{call(GOOD)}{call(GOOD)}then": [("message", "so"), CALLS, CALLS, ("message", "then")],
    f"{THINKS}b{THINKS}d{call('{')}": [
        *(("reasoning", "hm"), ("message", "b"), ("reasoning", "hm")),
        ("message", f"d{call('{')}"),
    ],
}


@pytest.fixture
def says(monkeypatch):
    """Have all responses say a text."""

    def force(text: str) -> None:
        source = GrammarSource("text", "choice", [text])
        monkeypatch.setattr(ResponseFields, "grammar", lambda fields: source)

    return force


def shown(item: dict[str, Any]) -> tuple[str, str]:
    """The type and the text of an item."""
    if item["type"] == "function_call":
        return item["type"], item["arguments"]
    return item["type"], "".join(part["text"] for part in item["content"])


def replayed(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The items that the events of a stream make, which come in OpenAI's order."""
    assert [event["sequence_number"] for event in found] == [*range(len(found))]
    for event in found:
        read = EVENT.validate_python(event)
        assert (read.type, {*(read.model_extra or ())} <= {"name"}) == (event["type"], True)
    created, begun, *found, last = found
    assert [created["type"], begun["type"]] == ["response.created", "response.in_progress"]
    items: list[dict[str, Any]] = []
    while found:
        added = found.pop(0)
        item = added["item"]
        assert (added["type"], added["output_index"]) == ("response.output_item.added", len(items))
        assert item["status"] == "in_progress"
        kinds, text = [], ""
        while (event := found.pop(0))["type"] != "response.output_item.done":
            kinds.append(event["type"].removeprefix("response."))
            assert (event["item_id"], event["output_index"]) == (item["id"], len(items))
            assert event.get("content_index", 0) == 0
            text += event.get("delta", "")
            assert event.get("text", event.get("arguments", text)) == text
        part = {"message": "output_text", "reasoning": "reasoning_text"}.get(item["type"])
        around = [["content_part.added"], ["content_part.done"]] if part else [[], []]
        form = part or "function_call_arguments"
        deltas = [f"{form}.delta"] * kinds.count(f"{form}.delta")
        assert kinds == [*around[0], *deltas, f"{form}.done", *around[1]]
        items.append(event["item"])
        assert (items[-1]["id"], shown(items[-1])) == (item["id"], (item["type"], text))
    assert len({item["id"] for item in items}) == len(items)
    assert last["response"]["output"] == items
    return items


def both(server, **fields: Any) -> list[Response]:
    """A response, plain and as a stream."""
    body = {"input": "a", **fields}
    plain, stream = answers(server, [body, {**body, "stream": True}], RESPONSES)
    items = replayed(events(stream.text))
    assert stream.text.count("event: ") == stream.text.count("data: ") == len(events(stream.text))
    last = events(stream.text)[-1]
    assert last["type"] == f"response.{last['response']['status']}"
    assert plain.status_code == 200, plain.text
    for name in ("status", "usage", "incomplete_details", "tools", "text"):
        assert plain.json()[name] == last["response"][name]
    assert [*map(shown, plain.json()["output"])] == [*map(shown, items)]
    return [Response.model_validate(each) for each in (plain.json(), last["response"])]


@pytest.mark.parametrize("text", ANSWERS)
def test_items_of_a_response(spoken, says, text):
    says(text)
    for response in both(spoken(), tools=FLAT):
        assert [shown(item.to_dict()) for item in response.output] == ANSWERS[text]
        assert (response.status, response.error) == ("completed", None)
        assert {item.status for item in response.output} == {"completed"}


@pytest.mark.parametrize("text", ["so it is", "<think>hm it is", f"so{call(GOOD)}"])
def test_a_response_that_is_cut(spoken, says, text):
    """Its last item says so; those before it are complete."""
    says(text)
    for response in both(spoken(), tools=FLAT, max_output_tokens=len(text) - 2):
        assert response.status == "incomplete"
        assert response.incomplete_details.reason == "max_output_tokens"
        assert [item.status for item in response.output] == ["incomplete"]
        assert response.output_text in ("", text[:-2])
    for response in both(spoken(), tools=FLAT, max_output_tokens=len(text) + 1):
        assert (response.status, response.incomplete_details) == ("completed", None)
        assert {item.status for item in response.output} == {"completed"}
    says(f"{THINKS}well")
    for response in both(spoken(), max_output_tokens=len(THINKS) + 2):
        assert [item.status for item in response.output] == ["completed", "incomplete"]


@pytest.mark.parametrize("text", ANSWERS)
def test_the_stream_of_the_sdk(spoken, says, text):
    says(text)
    server = spoken()

    async def talk() -> tuple[Any, list[Any]]:
        async with client_of(server) as http:
            client = openai.AsyncOpenAI(base_url="http://test/v1", api_key="none", http_client=http)
            asked = {"model": "tiny", "input": "a", "tools": FLAT}
            async with client.responses.stream(**asked) as stream:
                found = [event async for event in stream]
                return await stream.get_final_response(), found

    response, found = asyncio.run(talk())
    assert [shown(item.to_dict()) for item in response.output] == ANSWERS[text]
    deltas = [event for event in found if event.type.endswith(("text.delta", "arguments.delta"))]
    assert "".join(event.delta for event in deltas) == "".join(t for _, t in ANSWERS[text])


def test_what_was_asked_for_is_in_a_response(spoken, says):
    says("so")
    asked = {
        "instructions": "be brief",
        "max_output_tokens": 9,
        "metadata": {"a": "b"},
        "parallel_tool_calls": False,
        "temperature": 0.5,
        "top_p": 0.25,
        "tool_choice": "none",
        "text": {"format": {"type": "json_object"}},
        "tools": [{**FLAT[0], "strict": False}],
    }
    for response in both(spoken(), **asked):
        found = response.to_dict()
        assert {name: found[name] for name in asked} == asked
    nested = both(spoken(), tools=TOOLS)[0].to_dict()
    assert nested["tools"] == [{**FLAT[0], "strict": None}]
    bare = both(spoken())[0]
    assert (bare.tools, bare.tool_choice, bare.metadata) == ([], "auto", {})
    assert bare.text.format.type == "text"
    assert both(spoken())[0].id != bare.id


def test_a_response_whose_generation_fails(spoken, monkeypatch):
    """What has come stands in its last event."""
    server = spoken()

    async def outputs(sequences: Any) -> Any:
        raise RequestError("the generation failed: no", status=500)
        yield

    target = "lorafx.integrations.server.generating.Sequences.outputs"
    monkeypatch.setattr(target, outputs)
    body = question(RESPONSES, "a", 3, stream=True)
    found = events(ask(server, "POST", RESPONSES, model="tiny", **body).text)
    assert [event["type"] for event in found[2:]] == ["error", "response.failed"]
    for event in found:
        EVENT.validate_python(event)
    assert "no" in found[2]["message"]
    failed = Response.model_validate(found[3]["response"])
    assert (failed.status, failed.error.code) == ("failed", "server_error")
    answer = ask(server, "POST", RESPONSES, model="tiny", **question(RESPONSES, "a", 3))
    assert (answer.status_code, answer.json()["error"]["type"]) == (500, "server_error")


FUNCTION = {"name": "f", "arguments": {"x": 1}}


def messages_of(items: Any, **fields: Any) -> list[dict[str, Any]]:
    return text_messages(ResponseFields.read({"input": items, **fields}).messages)


def of_assistant(content: str = "", reasoning: str = "", calls: int = 0) -> dict[str, Any]:
    made: dict[str, Any] = {"role": "assistant", "content": content}
    both = ("reasoning_content", "reasoning")
    made |= dict.fromkeys(both, reasoning) if reasoning else {}
    entry = {"id": "c", "type": "function", "function": FUNCTION}
    return made | ({"tool_calls": [entry] * calls} if calls else {})


CALL = {"type": "function_call", "call_id": "c", "name": "f", "arguments": '{"x": 1}'}
RESULT = {"type": "function_call_output", "call_id": "c", "output": "1"}
REASONING = {"type": "reasoning", "id": "r", "summary": [], "content": None}
THOUGHT = {**REASONING, "content": [{"type": "reasoning_text", "text": "hm"}]}
SUMMED = {**REASONING, "summary": [{"type": "summary_text", "text": "hm"}]}
SAID = {
    **{"type": "message", "role": "assistant", "status": "completed", "id": "m"},
    "content": [{"type": "output_text", "text": "so", "annotations": [], "logprobs": []}],
}
TOOL = {"role": "tool", "tool_call_id": "c", "content": "1"}
TURNS = [
    ([SAID], [of_assistant("so")]),
    ([THOUGHT, SAID, CALL, CALL, RESULT], [of_assistant("so", "hm", 2), TOOL]),
    (
        [SUMMED, CALL, RESULT, THOUGHT, SAID],
        [of_assistant("", "hm", 1), TOOL, of_assistant("so", "hm")],
    ),
    ([CALL, RESULT, CALL, RESULT], [of_assistant(calls=1), TOOL] * 2),
    ([CALL, SAID, RESULT], [of_assistant(calls=1), of_assistant("so"), TOOL]),
    ([SAID, SAID], [of_assistant("so")] * 2),
    ([SAID, THOUGHT, CALL], [of_assistant("so"), of_assistant("", "hm", 1)]),
    ([REASONING, CALL], [of_assistant(calls=1)]),
    ([{**RESULT, "output": [{"type": "input_text", "text": "1"}]}], [TOOL]),
]


@pytest.mark.parametrize(("items", "want"), TURNS)
def test_items_of_an_input(items, want):
    user = {"role": "user", "content": "a"}
    assert messages_of([user, *items]) == [user, *want]
    assert messages_of([user, *items, user])[-1] == user


def test_other_inputs():
    assert messages_of("a") == [{"role": "user", "content": "a"}]
    parts = [{"type": "input_text", "text": each} for each in "ab"]
    assert messages_of([{"role": "user", "content": parts}])[0]["content"] == "a\nb"
    system = {"role": "system", "content": "a"}
    both = messages_of([system, {"role": "user", "content": "b"}], instructions="c")
    assert [message["content"] for message in both] == ["c", "a", "b"]
    wrong = [
        *([], 3, {}, [3], [{}], [[]], [{"role": None}]),
        *([{"type": "function_call"}], [{**THOUGHT, "content": 3}], [{**RESULT, "output": 3}]),
        *([{"type": "input_image", "role": "user"}], [{"type": "input_text", "text": "a"}]),
    ]
    for items in wrong:
        with pytest.raises(RequestError):
            messages_of(items)
    with pytest.raises(RequestError, match="`store: false`"):
        messages_of([{"type": "item_reference", "id": "r"}])


def test_a_response_as_the_next_input(spoken, says):
    """What OpenAI's client sends back of it, null fields included."""
    said = f"{THINKS}so{call(GOOD)}"
    says(said)
    server = spoken(f"{SHOWN}|")
    response = both(server, tools=FLAT)[0]
    called = response.output[2]
    items = [{"role": "user", "content": "a"}, *(item.model_dump() for item in response.output)]
    items.append({**RESULT, "call_id": called.call_id})
    made = messages_of(items)
    entry = {"id": called.call_id, "type": "function"}
    want = of_assistant("so", "hm") | {"tool_calls": [entry | {"function": FUNCTION}]}
    assert made[1:] == [want, {**TOOL, "tool_call_id": called.call_id}]
    prompt = ask(server, "POST", "/tokenize", model="tiny", messages=made, tools=TOOLS).json()
    answer = ask(server, "POST", RESPONSES, model="tiny", tools=FLAT, input=items).json()
    assert answer["usage"]["input_tokens"] == prompt["count"]
