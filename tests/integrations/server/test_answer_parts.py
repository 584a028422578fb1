"""What is found in an answer gives its text back, whatever that is: by the response templates that
transformers has, and by one of a tokenizer's own."""

from __future__ import annotations

import json
import re
from collections import Counter
from typing import Any, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from spoken import GEMMA, GOOD, QWEN, QWEN_XML, TOOLS
from transformers.cli.serving.utils import ReasoningText
from transformers.generation.continuous_batching.requests import RequestStatus
from transformers.utils.chat_parsing.response_templates import load_response_template

from lorafx.generation.continuous.adapter_requests import SequenceOutput
from lorafx.integrations.server.texts import MessageReader, opened_reasoning
from lorafx.torch_internals.response_parser import CALLS, AnswerParser

#: The form of harmony: the name is in the mark, all marks begin alike, one ends two regions.
OWN = {
    "start_anchor_pattern": r"<\|start\|>assistant(?: to=\w+)?",
    "fields": {
        "thinking": {
            "open": "<|channel|>analysis<|message|>",
            "close": ["<|end|>", "<|return|>"],
            "content": "text",
            "repeats": True,
            "join": "\n",
        },
        "tool_calls": {
            "open_pattern": r"<\|channel\|>commentary to=functions\.(?P<name>\w+)<\|message\|>",
            "close": "<|call|>",
            "content": "json",
            "repeats": True,
            "transform": {"function": {"name": "{name}", "arguments": "{content}"}},
        },
        "content": {"close_pattern": r"<\|return\|>", "content": "text"},
    },
}


class Form(NamedTuple):
    """A template, what opens and closes its reasoning, a call in three pieces, the marks that end
    the content, and beginnings of marks."""

    template: Any
    thought: tuple[str, str]
    call: tuple[str, str, str]
    ends: tuple[str, ...]
    others: tuple[str, ...]


_THINK, _QWEN_ENDS = ("<think>", "</think>"), ("<|im_end|>", "<|endoftext|>")
FORMS = {
    "Qwen3": Form(QWEN, _THINK, ("<tool_call>", GOOD, "</tool_call>"), _QWEN_ENDS, ("<tool_",)),
    "Qwen3.5": Form(
        QWEN_XML,
        _THINK,
        (
            "<tool_call>\n<function=f>",
            "\n<parameter=x>\n1\n</parameter>\n",
            "</function>\n</tool_call>",
        ),
        _QWEN_ENDS,
        ("<tool_call>", "<function=", "</function>", "</parameter>", "<parameter=y>"),
    ),
    "Gemma 4": Form(
        GEMMA,
        ("<|channel>thought\n", "<channel|>"),
        ("<|tool_call>call:f", '{x:1,y:<|"|>a,b:c<|"|>}', "<tool_call|>"),
        ("<turn|>", "<|tool_response>", "<eos>"),
        ("<|tool_call>", "call:", '<|"|>', "{x:", "<|channel>"),
    ),
    "its own": Form(
        OWN,
        ("<|channel|>analysis<|message|>", "<|end|>"),
        ("<|channel|>commentary to=functions.f<|message|>", '{"x": 1}', "<|call|>"),
        ("<|return|>",),
        ("<|channel|>", "<|end", "<|message|>", "commentary to=functions."),
    ),
}


def drawn(form: Form) -> st.SearchStrategy[list[str]]:
    pieces = [*form.thought, *form.call, "".join(form.call), *form.ends, *form.others]
    return st.lists(st.sampled_from([*pieces, "{", "}", '"', "\n", " "]) | st.text(max_size=3))


def parts_of(form: Form, tools: Any, pieces: list[str], cut: bool, opened: str = "") -> Any:
    """The content, the reasoning and the calls of an answer that comes in these pieces."""
    template = load_response_template(form.template)
    if tools is None:
        del template.fields[CALLS]
    parts, found = MessageReader(AnswerParser(template, tools, opened), True), []
    states = [RequestStatus.DECODING] * (len(pieces) - 1) + [RequestStatus.FINISHED]
    for piece, state in zip(pieces, states, strict=True):
        reason = "length" if cut else "stop"
        found += parts.put(piece, SequenceOutput("r", status=state, finish_reason=reason))
    said = "".join(part for part in found if type(part) is str)
    thought = "".join(part for part in found if isinstance(part, ReasoningText))
    called = [(part.name, part.arguments) for part in found if not isinstance(part, str)]
    assert len(called) == parts.calls
    return said, thought, called


def letters(*texts: str) -> Counter[str]:
    """The letters of texts, without white space, which may be lost beside marks."""
    return Counter(sign for text in texts for sign in text if not sign.isspace())


@pytest.mark.parametrize("tools", [None, TOOLS], ids=["no tools", "tools"])
@pytest.mark.parametrize("name", FORMS)
@settings(max_examples=150, derandomize=True)
@given(data=st.data(), cut=st.booleans(), opened=st.booleans())
def test_the_parts_of_any_answer_give_its_text_back(name, tools, data, cut, opened):
    """All but marks, and white space beside them; plain and streamed alike."""
    form = FORMS[name]
    pieces, mark = data.draw(drawn(form)), form.thought[0] if opened else ""
    text = "".join(pieces)
    plain = said, thought, called = parts_of(form, tools, [text], cut, mark)
    assert parts_of(form, tools, [*pieces, ""], cut, mark) == plain
    assert parts_of(form, tools, [*text, ""], cut, mark) == plain
    assert tools or not called
    marks = [*form.thought, *form.ends, *(form.call if called else ())]
    if not any(mark in text for mark in marks):
        assert said + thought == text
    known = "|".join(map(re.escape, sorted(marks, key=len, reverse=True)))
    removed = letters(*re.findall(known, text), *form.others * bool(called))
    assert not letters(said, thought) - letters(text)
    values = [str(value) for _, sent in called for value in json.loads(sent).values()]
    assert not letters(text) - letters(said, thought, *values) - removed


@pytest.mark.parametrize("name", FORMS)
def test_a_call_of_each_form(name):
    form = FORMS[name]
    text = "so" + "".join(form.call) * 2
    said, thought, called = parts_of(form, TOOLS, [text], False)
    assert (said, thought, [name for name, _ in called]) == ("so", "", ["f", "f"])
    assert parts_of(form, None, [text], False) == (text, "", [])
    hidden = "".join((form.thought[0], "hm", form.thought[1], "so"))
    assert parts_of(form, None, [hidden], False) == ("so", "hm", [])
    template = load_response_template(form.template)
    assert opened_reasoning(template, form.thought[0].strip(), "") == form.thought[0]
