"""Answers that keep to a grammar, and calls of tools that are found in answers."""

from __future__ import annotations

import json
import re
import string
import sys

import pytest
from served import anew, ask, events, question, serving, write_files
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lorafx.integrations.server.fields import GrammarSource, ResponseFields

CHAT, COMPLETIONS, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"
SIGNS = '{}[]":,.-_ <>/' + string.ascii_lowercase + string.digits
#: Calls stand between <call> and </call>, and what the model thinks between < and >.
RESPONSE = {
    "defaults": {"role": "assistant"},
    "start_anchor": ">>",
    "fields": {
        "reasoning_content": {"open": "<t>", "close": "</t>", "content": "text"},
        "tool_calls": {
            "open": "<call>",
            "close": "</call>",
            "repeats": True,
            "content": "json",
            "transform": {"type": "function", "function": "{content}"},
        },
        "content": {"close": "</s>", "content": "text"},
    },
}
TEMPLATE = (
    "{% if tools %}{{ tools | tojson }}{% endif %}"
    "{% for m in messages %}{{ m.content }}{% endfor %}>>"
)
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]


def tokenizer(size: int, chat_template: str = TEMPLATE, **others) -> PreTrainedTokenizerFast:
    """Each sign is a token, from 3 on."""
    signs = ["<pad>", "<s>", "</s>", *SIGNS.replace(" ", "Ġ"), *string.ascii_uppercase]
    made = Tokenizer(models.BPE({sign: i for i, sign in enumerate(signs[:size])}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    others |= {"pad_token": "<pad>", "eos_token": "</s>", "chat_template": chat_template}
    return PreTrainedTokenizerFast(tokenizer_object=made, **others)


def spoken(server, files, **others):
    """The same model with another tokenizer."""
    made = tokenizer(server.compiled._orig_mod.config.vocab_size, **others)
    return anew(server, files, made)


@pytest.fixture(scope="module")
def speaker(tmp_path_factory):
    """A model that has room for longer answers, with a tokenizer of signs."""
    folder = tmp_path_factory.mktemp("signs")
    files = write_files(folder, max_position_embeddings=512)
    tokenizer(files.case.base.config.vocab_size).save_pretrained(files.model)
    with serving(files) as server:
        yield server


@pytest.fixture(scope="module")
def caller(speaker, files):
    return spoken(speaker, files, response_template=RESPONSE)


def texts(server, path, new=40, **fields):
    answer = ask(server, "POST", path, model="tiny:a1", **question(path, "a", new, **fields))
    assert answer.status_code == 200, answer.text
    body = answer.json()
    if path == RESPONSES:
        return [body["output"][0]["content"][0]["text"]]
    if path == COMPLETIONS:
        return [choice["text"] for choice in body["choices"]]
    return [choice["message"]["content"] for choice in body["choices"]]


SCHEMA = {
    "type": "object",
    "properties": {
        "a": {"type": "integer", "minimum": 0, "maximum": 99},
        "b": {"enum": ["x", "y"]},
    },
    "required": ["a", "b"],
    "additionalProperties": False,
    "x-guidance": {"whitespace_flexible": False},
}


def is_of_schema(text: str) -> bool:
    value = json.loads(text)
    return {*value} == {"a", "b"} and 0 <= value["a"] <= 99 and value["b"] in ("x", "y")


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_json_schema(speaker, path):
    asked = {"type": "json_schema", "json_schema": {"name": "t", "schema": SCHEMA, "strict": True}}
    (text,) = texts(speaker, path, response_format=asked)
    assert is_of_schema(text)
    drawn = {"temperature": 9.0, "seed": 1, "n": 4}
    several = texts(speaker, path, response_format=asked, **drawn)
    assert len({*several}) > 1
    assert all(map(is_of_schema, several))
    body = question(path, "a", 40, response_format=asked, stream=True)
    chunks = events(ask(speaker, "POST", path, model="tiny:a1", **body).text)
    pieces = [chunk["choices"][0] for chunk in chunks]
    whole = "".join(p.get("text") or p.get("delta", {}).get("content") or "" for p in pieces)
    assert whole == text
    assert pieces[-1]["finish_reason"] == "stop"


def test_json_schema_of_a_response(speaker):
    asked = {"format": {"type": "json_schema", "name": "t", "schema": SCHEMA}}
    assert is_of_schema(texts(speaker, RESPONSES, text=asked)[0])


def test_json_object(speaker):
    (close,) = ask(speaker, "POST", "/tokenize", prompt="}").json()["tokens"]
    fields = {"response_format": {"type": "json_object"}, "logit_bias": {str(close): 100}}
    assert json.loads(texts(speaker, CHAT, **fields)[0]) == {}
    assert texts(speaker, CHAT, new=1, response_format={"type": "json_object"})[0] == "{"


@pytest.mark.parametrize(
    ("asked", "form"),
    [
        ({"regex": "[0-9]{3}-[a-z]{2}"}, "[0-9]{3}-[a-z]{2}"),
        ({"choice": ["yes", 'no "x"']}, 'yes|no "x"'),
        ({"grammar": 'start: "a" NUMBER\nNUMBER: /[0-9]{2}/'}, "a[0-9]{2}"),
        ({"json": SCHEMA}, r'\{"a":[0-9]+,"b":"[xy]"\}'),
        ({"json_object": True, "regex": None}, r"\{.*"),
    ],
    ids=lambda asked: asked if isinstance(asked, str) else next(iter(asked)),
)
def test_structured_outputs(speaker, asked, form):
    (text,) = texts(speaker, COMPLETIONS, structured_outputs=asked)
    assert re.fullmatch(form, text, re.DOTALL)
    # Special tokens have no place in a grammar.
    (shown,) = texts(speaker, COMPLETIONS, structured_outputs=asked, skip_special_tokens=False)
    assert shown == text


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"structured_outputs": {"regex": "("}}, "regex"),
        ({"structured_outputs": {"regex": 3}}, "structured_outputs"),
        ({"structured_outputs": {"choice": 3}}, "structured_outputs"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs"),
        ({"structured_outputs": {"grammar": "no"}}, "structured_outputs"),
        ({"structured_outputs": {"json": {"type": "no"}}}, "structured_outputs"),
        ({"structured_outputs": {"json": SCHEMA, "regex": "a"}}, "one grammar"),
        (
            {"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}},
            "one grammar",
        ),
    ],
)
def test_what_is_no_grammar(speaker, fields, word):
    body = question(COMPLETIONS, "a", 3, **fields)
    answer = ask(speaker, "POST", COMPLETIONS, model="tiny", **body)
    assert answer.status_code == 400, answer.text
    assert word in answer.json()["error"]["message"]


def test_thousands_of_alternatives(speaker):
    choice = [f"word{i}" for i in range(3000)]
    (text,) = texts(speaker, COMPLETIONS, structured_outputs={"choice": choice})
    assert text in choice


@pytest.mark.parametrize(
    "asked",
    [
        {"grammar": "start: " + " | ".join(f'"word{i}"' for i in range(3000))},
        {"json": {"type": "object", "properties": {f"p{i}": {} for i in range(3000)}}},
    ],
    ids=["grammar", "json"],
)
def test_a_grammar_that_is_too_large_never_comes_to_the_engine(speaker, monkeypatch, asked):
    """Its first mask is computed when the request is read."""
    monkeypatch.setattr(speaker.engine, "add_request", None)
    body = question(COMPLETIONS, "a", 9, structured_outputs=asked)
    answer = ask(speaker, "POST", COMPLETIONS, model="tiny", **body)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "structured_outputs"


def test_a_grammar_whose_words_are_banned(speaker):
    """What the request asked for left no token: a refusal of the request, not a failed server."""
    fields = {"structured_outputs": {"choice": ["a"]}, "bad_words": ["a"]}
    answer = ask(
        speaker, "POST", COMPLETIONS, model="tiny", **question(COMPLETIONS, "b", 9, **fields)
    )
    assert answer.status_code == 400
    assert "leave no token" in answer.json()["error"]["message"]
    assert texts(speaker, COMPLETIONS, structured_outputs={"choice": ["a"]}) == ["a"]


def test_a_grammar_that_fails_is_not_repeated(speaker):
    rule = "start: " + " | ".join(f'"word{i}"' for i in range(3000))
    fields = question(COMPLETIONS, "a", 9, structured_outputs={"grammar": rule})
    answer = ask(speaker, "POST", COMPLETIONS, model="tiny", **fields)
    assert answer.status_code == 400
    assert "3001 items" in answer.json()["error"]["message"]
    assert "word1" not in answer.text


def test_without_the_library(speaker, server, monkeypatch):
    fields = {"response_format": {"type": "json_object"}}
    words = ask(server, "POST", CHAT, model="tiny", **question(CHAT, "w9", 3, **fields))
    assert words.status_code == 400  # a tokenizer of words, which has no bytes
    monkeypatch.setitem(sys.modules, "llguidance", None)
    answer = ask(speaker, "POST", CHAT, model="tiny", **question(CHAT, "a", 3, **fields))
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert (error["param"], "lorafx[grammar]" in error["message"]) == ("response_format", True)


def call(*arguments: int) -> str:
    calls = (f'<call>{{"name": "f", "arguments": {{"x": {x}}}}}</call>' for x in arguments)
    return "".join(calls)


@pytest.mark.parametrize("parallel", [True, False])
def test_calls_of_tools(caller, parallel):
    said = "<t>hm</t>well" + call(1, 2)
    fields = {
        "tools": TOOLS,
        "parallel_tool_calls": parallel,
        "structured_outputs": {"choice": [said]},
    }
    answer = ask(caller, "POST", CHAT, model="tiny", **question(CHAT, "a", 200, **fields)).json()
    (choice,) = answer["choices"]
    assert choice["finish_reason"] == "tool_calls"
    message = choice["message"]
    assert (message["content"], message["reasoning_content"]) == ("well", "hm")
    found = [entry["function"] for entry in message["tool_calls"]]
    want = [{"name": "f", "arguments": json.dumps({"x": x})} for x in (1, 2)]
    assert found == want[: 2 if parallel else 1]
    assert len({entry["id"] for entry in message["tool_calls"]}) == len(found)
    body = question(CHAT, "a", 200, stream=True, **fields)
    deltas = [
        chunk["choices"][0]
        for chunk in events(ask(caller, "POST", CHAT, model="tiny", **body).text)
    ]
    streamed = [e for d in deltas for e in d["delta"].get("tool_calls", ())]
    assert [entry["function"] for entry in streamed] == found
    assert [entry["index"] for entry in streamed] == [*range(len(found))]
    assert "".join(d["delta"].get("content") or "" for d in deltas) == "well"
    assert "".join(d["delta"].get("reasoning_content") or "" for d in deltas) == "hm"
    assert deltas[-1]["finish_reason"] == "tool_calls"


def test_tools_that_may_not_be_called(caller):
    fields = {"tools": TOOLS, "tool_choice": "none", "max_tokens": 3}
    with_tools = texts(caller, CHAT, new=3, **fields)
    assert with_tools == texts(caller, CHAT, new=3)


@pytest.mark.parametrize("parallel", [True, False])
def test_calls_of_tools_in_a_response(caller, monkeypatch, parallel):
    words = "<t>hm</t>well" + call(1, 2)
    source = GrammarSource("text", "choice", [words])
    monkeypatch.setattr(ResponseFields, "grammar", lambda fields: source)
    tools = [{"type": "function", "name": "f", "parameters": {"type": "object"}}]
    body = question(RESPONSES, "a", 200, tools=tools, parallel_tool_calls=parallel)
    whole = ask(caller, "POST", RESPONSES, model="tiny", **body).json()
    reasoning, message, *calls = whole["output"]
    assert reasoning["content"][0]["text"] == "hm"
    assert message["content"][0]["text"] == "well"
    want = [json.dumps({"x": x}) for x in (1, 2)][: 2 if parallel else 1]
    assert [(entry["name"], entry["arguments"]) for entry in calls] == [("f", x) for x in want]
    found = events(ask(caller, "POST", RESPONSES, model="tiny", **body, stream=True).text)
    assert [event["sequence_number"] for event in found] == [*range(len(found))]
    kinds = [event["type"] for event in found]
    assert kinds[:2] == ["response.created", "response.in_progress"]
    assert kinds.count("response.output_item.done") == len(whole["output"])
    assert (found[-1]["type"], found[-1]["response"]["usage"]) == (
        "response.completed",
        whole["usage"],
    )


@pytest.mark.parametrize("path", [CHAT, RESPONSES])
def test_tools_that_a_model_cannot_call(speaker, files, path):
    silent = "{% for m in messages %}{{ m.content }}{% endfor %}"
    without = spoken(speaker, files, response_template=RESPONSE, chat_template=silent)
    for asked, word in ((speaker, "response template"), (without, "chat template")):
        answer = ask(asked, "POST", path, model="tiny", **question(path, "a", 3, tools=TOOLS))
        assert answer.status_code == 400, answer.text
        error = answer.json()["error"]
        assert (error["param"], word in error["message"]) == ("tools", True)
