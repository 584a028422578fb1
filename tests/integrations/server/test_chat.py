"""Chat with answers that are forced: nothing of a prompt is in an answer, nothing of an answer is
lost, and nothing of a message either."""

from __future__ import annotations

import json
import logging
from typing import Any

import pytest
from openai.types.chat import ChatCompletion
from served import ask, events, question
from spoken import CHAT, GEMMA, GOOD, QWEN, QWEN_XML, SHOWN, TOOLS, answers, call


def message_of(answer: Any) -> dict[str, Any]:
    """The message of an answer, which may be a stream."""
    assert answer.status_code == 200, answer.text
    if answer.headers["content-type"] == "application/json":
        message = answer.json()["choices"][0]["message"]
        pieces = [message]
    else:
        found = events(answer.text)
        assert not any("error" in event for event in found), found
        pieces = [event["choices"][0]["delta"] for event in found]
    calls = [call["function"] for piece in pieces for call in piece.get("tool_calls", ())]
    made = {
        name: "".join(piece.get(name) or "" for piece in pieces)
        for name in ("content", "reasoning_content")
    }
    return {**made, "calls": [(call["name"], json.loads(call["arguments"])) for call in calls]}


def forced(server, texts: list[str], **fields: Any) -> list[dict[str, Any]]:
    """The messages of answers that are these texts: plain, and the same as streams."""
    fields = {"messages": [{"role": "user", "content": "a"}], **fields}
    bodies = [
        {**fields, "structured_outputs": {"choice": [text]}, "stream": stream}
        for stream in (False, True)
        for text in texts
    ]
    found = [message_of(answer) for answer in answers(server, bodies)]
    plain, streamed = found[: len(texts)], found[len(texts) :]
    assert streamed == plain
    return plain


CALLED = ("f", {"x": 1})
#: Texts that are what they look like: text.
NO_CALLS = [
    *map(
        call,
        (
            *('{"name": "now"}', '{"arguments": {}}', '{"name": 3, "arguments": {}}', "[1]", "3"),
            *('{"name": "f", "arguments": [1]}', '{"name": "f", "arguments": "no"}', "{", ""),
            *(
                '{"name": "", "arguments": {}}',
                '{"name": "\\ud800", "arguments": {}}',
                "null",
                "[]",
            ),
            *('{"name": "f", "arguments": {"x": NaN}}', "[" * 200, "<tool_call>", "\x00", '"é'),
        ),
    ),
    *(
        "",
        " ",
        "a\n\n b ",
        "</tool_call>",
        "</think>a",
        "<tool_call",
        "<tool_call>{",
        "é \U0001f600",
    ),
    *(f"a \n{call('{')}\n b{call('3')}c", '<tool_call>{"name": "f", "argum'),
]
#: Others, with their content, reasoning and calls.
OTHERS = {
    call(GOOD): ("", "", [CALLED]),
    f"so{call(GOOD)}{call(GOOD)}\nthen": ("so\nthen", "", [CALLED, CALLED]),
    f"{call('3')}{call(GOOD)}": (call("3"), "", [CALLED]),
    f"<tool_call>{GOOD}": ("", "", [CALLED]),  # it has ended by itself
    f"<think>hm{call(GOOD)}</think>well{call(GOOD)}": ("well", f"hm{call(GOOD)}", [CALLED]),
    "<think>hm": ("", "hm", []),
    call('{"name": "f", "arguments": "{\\"x\\": 1}"}'): ("", "", [CALLED]),
}


def test_what_is_no_call_is_text(spoken):
    found = forced(spoken(), [*NO_CALLS, *OTHERS], tools=TOOLS)
    wanted = [(text, "", []) for text in NO_CALLS] + [*OTHERS.values()]
    for text, message, want in zip([*NO_CALLS, *OTHERS], found, wanted, strict=True):
        assert tuple(message.values()) == want, text


@pytest.mark.parametrize("fields", [{}, {"tools": []}, {"tools": TOOLS, "tool_choice": "none"}])
def test_without_tools_nothing_is_a_call(spoken, fields):
    texts = [call(GOOD), f"a\n{call(GOOD)} b", call("{"), f"<think>hm</think>b{call(GOOD)}"]
    found = forced(spoken(), texts, **fields)
    assert [message["content"] for message in found] == [*texts[:3], f"b{call(GOOD)}"]
    assert [message["calls"] for message in found] == [[]] * 4
    assert found[3]["reasoning_content"] == "hm"


def test_an_answer_that_is_cut_within_a_call(spoken, caplog):
    """Its text is the client's, and not the log's."""
    xml = "<tool_call>\n<function=f>\n<parameter=x>1</parameter>\n<parameter=y>2\n"
    gemma = '<|tool_call>call:f{x:<|"|>secret'
    whole = f"{xml}</parameter></function></tool_call>"
    for template, text in ((QWEN, call(GOOD)), (QWEN_XML, whole), (GEMMA, f'{gemma}<|"|>}}')):
        cut = {"max_tokens": len(text) - 8, "tools": TOOLS}
        with caplog.at_level(logging.DEBUG):
            (message,) = forced(spoken(SHOWN, template), [text], **cut)
        assert message == {"content": text[:-8], "reasoning_content": "", "calls": []}
    # A stop of the client's cuts, too.
    (message,) = forced(spoken(SHOWN, QWEN_XML), [whole], tools=TOOLS, stop="2")
    assert message["content"] == xml[:-2]
    assert "secret" not in caplog.text
    assert "<tool_call>" not in caplog.text


def test_text_within_a_call_that_is_in_none_of_its_tags(spoken):
    begins, ends = "<tool_call><function=f>", "</function></tool_call>"
    texts = [begins + inside + ends for inside in ("<parameter=x>1</parameter>", "lost", "")]
    found = forced(spoken(SHOWN, QWEN_XML), texts, tools=TOOLS)
    assert [(m["content"], m["calls"]) for m in found] == [
        ("", [("f", {"x": "1"})]),
        (texts[1], []),
        ("", [("f", {})]),
    ]


#: What a chat template may write before an answer. In two of them jinja has stripped the newline
#: at the end of a file, and two have nothing that the response template looks for.
BEGINNINGS = {
    "anchor": "<|im_start|>assistant\n",
    "anchor without a newline": "<|im_start|>assistant",
    "none": "Assistant: ",
    "anchor, reasoning": "<|im_start|>assistant\n<think>\n",
    "none, reasoning": "Assistant: <think>",
    "reasoning that is closed": "<|im_start|>assistant\n<think>\n\n</think>\n\n",
}
#: Those before an assistant's message that is continued.
BEGUN = {"so": False, "<think>so": True, "<think>a</think>so": False}
BOTH_WAYS = ["well", "hm</think>well"]


@pytest.mark.parametrize("tools", [None, TOOLS], ids=["no tools", "tools"])
@pytest.mark.parametrize("begins", BEGINNINGS)
def test_nothing_of_a_prompt_is_in_an_answer(spoken, begins, tools):
    """Only a block of reasoning that the prompt has opened counts."""
    server = spoken(
        "{{ tools }}{% for m in messages %}{{ m.role }} {{ m.content }}<|im_end|>{% endfor %}"
        f"{{% if add_generation_prompt %}}{{{{ {json.dumps(BEGINNINGS[begins])} }}}}{{% endif %}}"
    )
    messages = [
        {"role": "system", "content": f"secret <think> {call(GOOD)}"},
        {"role": "assistant", "content": "<|im_start|>assistant\n<think> old"},
        {"role": "user", "content": "what does this do: <think>"},
    ]

    def answered(messages: list[dict[str, str]], **fields: Any) -> list[tuple[str, str]]:
        found = forced(server, BOTH_WAYS, messages=messages, tools=tools, **fields)
        assert not any(message["calls"] for message in found)
        return [(message["content"], message["reasoning_content"]) for message in found]

    text, reasoning = [(text, "") for text in BOTH_WAYS], [("", "well"), ("well", "hm")]
    assert answered(messages) == (reasoning if begins.endswith(", reasoning") else text)
    assert answered(messages, add_generation_prompt=False) == text
    for begun, opened in BEGUN.items():
        continued = [*messages, {"role": "assistant", "content": begun}]
        fields = {"add_generation_prompt": False, "continue_final_message": True}
        assert answered(continued, **fields) == (reasoning if opened else text)


def test_the_end_of_a_sequence_is_no_text(spoken):
    """Not even where the response template does not know it."""
    assert QWEN["fields"]["content"]["close_pattern"].count("</s>") == 0
    assert forced(spoken(), ["well"], tools=TOOLS)[0]["content"] == "well"
    assert forced(spoken(), ["<think>hm"])[0]["reasoning_content"] == "hm"


def prompt_of(server, message: Any, **fields: Any) -> Any:
    """The messages of which the chat template makes a prompt, or the error."""
    answer = ask(server, "POST", "/tokenize", model="tiny", messages=[message], **fields)
    if answer.status_code != 200:
        assert answer.status_code == 400, answer.text
        return answer.json()["error"]["message"]
    tokens = answer.json()["tokens"]
    made = json.loads(
        ask(server, "POST", "/detokenize", model="tiny", tokens=tokens).json()["prompt"]
    )
    made[0].pop("thinking", None)  # transformers' own, for some templates
    return made[0]


CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
BARE = {"role": "assistant", "content": "so"}
REASONED = {**BARE, "reasoning": "hm", "reasoning_content": "hm"}
#: Of a message that says "so": what else is sent, and what is in the prompt of it.
FIELDS = [
    *((dict.fromkeys([name]), BARE) for name in ("name", "tool_call_id", "tool_calls", "refusal")),
    *((dict.fromkeys([name]), BARE) for name in ("reasoning", "audio", "function_call")),
    ({"content": None}, {**BARE, "content": ""}),
    ({"content": []}, {**BARE, "content": ""}),
    ({"content": [{"type": "text", "text": t} for t in "ab"]}, {**BARE, "content": "a\nb"}),
    ({"tool_calls": []}, BARE),
    ({"tool_calls": [CALL]}, {**BARE, "tool_calls": [CALL]}),
    ({"role": "user", "tool_calls": [CALL]}, {**BARE, "role": "user", "tool_calls": [CALL]}),
    ({"content": None, "tool_calls": [CALL]}, {**BARE, "content": "", "tool_calls": [CALL]}),
    ({"name": "me", "tool_call_id": "c"}, {**BARE, "name": "me", "tool_call_id": "c"}),
    ({"name": ""}, {**BARE, "name": ""}),
    ({"reasoning": "hm"}, REASONED),
    ({"reasoning_content": "hm"}, REASONED),
    ({"reasoning_content": "hm", "reasoning": None}, REASONED),
]
WRONG = [
    *({name: value} for name in ("name", "tool_call_id", "reasoning") for value in (3, ["a"])),
    *({"content": value} for value in (3, {"text": "a"}, [None], [{"type": "text"}])),
    *({"tool_calls": value} for value in ("a", {}, 3, [3], [{}], [[]], [{"function": "f"}])),
    *({"tool_calls": [{"function": {"name": name}}]} for name in (None, 3)),
    {"role": None},
]


def test_the_fields_of_a_message(spoken):
    server = spoken()
    for sent, want in FIELDS:
        assert prompt_of(server, {**BARE, **sent}) == want, sent
    for sent in WRONG:
        assert isinstance(prompt_of(server, {**BARE, **sent}), str), sent


def test_the_arguments_of_calls(spoken):
    server = spoken()

    def arguments(sent: Any, **function: Any) -> Any:
        call = {**CALL, "function": {"name": "f", **sent}, **function}
        made = prompt_of(server, {"role": "assistant", "tool_calls": [call]})
        return made if isinstance(made, str) else made["tool_calls"][0]["function"]["arguments"]

    assert arguments({}) == {}
    for nothing in (None, "", " ", "{}", {}):
        assert arguments({"arguments": nothing}) == {}
    for value in ({"x": 1}, '{"x": 1}'):
        assert arguments({"arguments": value}) == {"x": 1}
    for wrong in (3, [1], "3", "[1]", "{", '{"x": "\\ud800"}', "[" * 100_000, '{"x":' * 900):
        assert isinstance(arguments({"arguments": wrong}), str), wrong
    deep = '{"x":' * 900 + "1" + "}" * 900
    assert isinstance(arguments({"arguments": deep}), str | dict)


def test_an_answer_as_the_next_message(spoken):
    """What OpenAI's client sends back of it, null fields included."""
    server = spoken()
    said = f"<think>hm</think>so{call(GOOD)}"
    body = question(CHAT, "a", 200, tools=TOOLS, structured_outputs={"choice": [said]})
    completion = ChatCompletion.model_validate(
        ask(server, "POST", CHAT, model="tiny", **body).json()
    )
    (choice,) = completion.choices
    made = prompt_of(server, choice.message.model_dump())
    (called,) = made.pop("tool_calls")
    assert made == REASONED
    assert called["function"] == CALL["function"]


def test_the_effort_of_reasoning(spoken):
    """It is a variable of the template; where that does not read it, the prompt is the same."""
    reads, ignores = spoken("{{ reasoning_effort or 'nothing' }}"), spoken("nothing")
    kept = {"chat_template_kwargs": {"reasoning_effort": "from the arguments"}}
    for path, name, field in (
        (CHAT, "prompt_tokens", lambda effort: {"reasoning_effort": effort}),
        (CHAT, "prompt_tokens", lambda effort: {"reasoning": {"effort": effort}}),
        ("/v1/responses", "input_tokens", lambda effort: {"reasoning": {"effort": effort}}),
        ("/v1/messages", "input_tokens", lambda effort: {"output_config": {"effort": effort}}),
    ):
        for fields, prompt in (
            (field("minimal"), "minimal"),
            (kept | field("high"), "high"),
            (kept | field(None), "from the arguments"),
            ({}, "nothing"),
        ):
            for server, want in ((reads, prompt), (ignores, "nothing")):
                body = {"model": "tiny", **question(path, "a", 1), **fields}
                answer = ask(server, "POST", path, **body).json()
                assert answer["usage"][name] == len(want), answer
        if path == "/v1/responses":
            body = question(path, "a", 1, reasoning={"effort": "low", "summary": "auto"})
            echoed = ask(reads, "POST", path, model="tiny", **body).json()["reasoning"]
            assert echoed == {"effort": "low", "summary": "auto"}


def test_reasoning_that_a_prompt_opens_which_is_cut(spoken):
    server = spoken(SHOWN + "{% if add_generation_prompt %}<think>{% endif %}")
    body = question(CHAT, "a", 30, structured_outputs={"choice": ["hm</think>so"]})
    answer = ask(server, "POST", CHAT, model="tiny", **body, truncate_prompt_tokens=10).json()
    assert answer["usage"]["prompt_tokens"] == 10
    message = answer["choices"][0]["message"]
    assert (message["reasoning_content"], message["content"]) == ("hm", "so")
