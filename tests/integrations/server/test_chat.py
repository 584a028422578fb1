"""Chat with answers that are forced: nothing of a prompt is in an answer, nothing of an answer is
lost, and nothing of a message either."""

from __future__ import annotations

import asyncio
import json
import logging
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from served import anew, ask, client_of, events, question, serving, write_files
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.cli.serving.utils import ReasoningText, get_response_template
from transformers.utils.chat_parsing.response_templates import load_response_template

from lorafx.integrations.server.texts import MessageParts
from lorafx.torch_internals.response_parser import AnswerParser

CHAT, RESPONSES = "/v1/chat/completions", "/v1/responses"
SHOWN = "{{ messages | tojson }}{% if tools %}{{ tools | tojson }}{% endif %}"
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
#: What transformers has for models of these types: no model of them is needed.
QWEN, QWEN_XML, GEMMA = (
    get_response_template(None, SimpleNamespace(config=SimpleNamespace(model_type=kind)))
    for kind in ("qwen3", "qwen3_5", "gemma4")
)


def tokenizer(chat_template: str = SHOWN, response_template: Any = QWEN) -> PreTrainedTokenizerFast:
    """Each byte is a token, from 3 on."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    signs = ["<pad>", "<s>", "</s>", *alphabet]
    made = Tokenizer(models.BPE({sign: i for i, sign in enumerate(signs)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    templates = {"chat_template": chat_template, "response_template": response_template}
    return PreTrainedTokenizerFast(tokenizer_object=made, **special, **templates)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    sizes = {"num_hidden_layers": 1, "max_position_embeddings": 4096, "vocab_size": 259}
    files = write_files(tmp_path_factory.mktemp("chat"), **sizes)
    tokenizer().save_pretrained(files.model)
    return files


@pytest.fixture(scope="module")
def speaker(written):
    with serving(written, num_blocks=4096, max_batch_tokens=256) as server:
        yield server


@pytest.fixture
def spoken(speaker, written):
    """The server with another tokenizer."""
    return lambda *templates: anew(speaker, written, tokenizer(*templates))


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


def answers(server, bodies: list[dict[str, Any]], path: str = CHAT) -> list[Any]:
    """The answers to requests that are sent at one time."""

    async def all_at_once():
        async with client_of(server) as client:
            sent = [client.post(path, json={"model": "tiny", **body}) for body in bodies]
            return await asyncio.wait_for(asyncio.gather(*sent), 120)

    return asyncio.run(all_at_once())


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


def call(body: str) -> str:
    return f"<tool_call>{body}</tool_call>"


GOOD = '{"name": "f", "arguments": {"x": 1}}'
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


PIECES = st.sampled_from(
    ["<tool_call>", "</tool_call>", "<think>", "</think>", GOOD, "{", "}", '"', "[", "1", "\n", " "]
)
DRAWN = st.lists(PIECES | st.text(max_size=3), max_size=9)


@pytest.mark.parametrize("tools", [None, TOOLS], ids=["no tools", "tools"])
@settings(max_examples=150, deadline=None, derandomize=True)
@given(pieces=DRAWN, cut=st.booleans())
def test_the_parts_of_any_answer_give_its_text_back(tools, pieces, cut):
    """All but the marks of reasoning and calls, and white space before a call; plain and streamed
    alike, whatever the pieces are."""
    text = "".join(pieces)

    def parts_of(pieces: list[str]) -> tuple[str, str, list[tuple[str, str]]]:
        template = load_response_template(QWEN)
        if tools is None:
            del template.fields["tool_calls"]
        parts = MessageParts(AnswerParser(template, tools, ""), True)
        found = []
        for index, piece in enumerate(pieces, 1):
            ended = SimpleNamespace(
                is_finished=lambda last=index == len(pieces): last,
                finish_reason="length" if cut else "stop",
                stop_reason=None,
            )
            found += parts.put(piece, ended)
        said = "".join(part for part in found if type(part) is str)
        thought = "".join(part for part in found if isinstance(part, ReasoningText))
        called = [(part.name, part.arguments) for part in found if not isinstance(part, str)]
        assert len(called) == parts.calls
        return said, thought, called

    plain = parts_of([text])
    assert parts_of([*pieces, ""]) == plain
    assert parts_of([*text, ""]) == plain
    said, thought, called = plain
    assert tools or not called
    assert said == text or called or "<think>" in text
    letters = sorted(said + thought + "".join(GOOD for _ in called))
    marks = "<tool_call></tool_call>" * len(called) + "<think></think>" * text.count("<think>")
    # Nothing is new, and what is missing are marks.
    missing = sorted(text)
    for letter in letters:
        missing.remove(letter)
    left = sorted(marks)
    for letter in (sign for sign in missing if not sign.isspace()):
        left.remove(letter)
