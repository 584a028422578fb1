"""Calls that are forced, or held to the schemas of their tools: by the form in which the response
template of a model finds them."""

from __future__ import annotations

import json
from functools import partial
from itertools import product
from typing import Any

import pytest
from openai.types.chat import ChatCompletion
from served import ask, events, question
from spoken import CHAT, GEMMA, QWEN, QWEN_XML, RESPONSES, answers, tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast
from transformers.utils.chat_parsing.response_templates import load_response_template

from lorafx.integrations.server.call_grammars import answer_grammar, inlined
from lorafx.integrations.server.errors import RequestError
from lorafx.integrations.server.fields import GrammarSource
from lorafx.integrations.server.grammars import Grammars
from lorafx.torch_internals.response_parser import CALLS, AnswerParser

GEMMAS, THOUGHT = "JSON of Gemma", "<|channel>thought\n"
TEMPLATES = {"JSON": QWEN, "tags": QWEN_XML, GEMMAS: GEMMA}
#: What stands between the marks of each, which some tokenizers have as tokens that are no text.
MARKS = {
    "JSON": ["<tool_call>", "</tool_call>", "<think>", "</think>"],
    "tags": ["<tool_call>", "</tool_call>", "<think>", "</think>"],
    GEMMAS: ["<|tool_call>", "<tool_call|>", '<|"|>', "<|channel>", "<channel|>"],
}
SCHEMA = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 3},
        "days": {"type": "integer", "minimum": 1, "maximum": 9},
        "unit": {"type": ["string", "null"], "enum": ["c", "f", None]},
        "at": {"anyOf": [{"$ref": "#/$defs/At"}, {"type": "null"}]},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 2}, "maxItems": 2},
    },
    "required": ["city", "days"],
    "additionalProperties": False,
    "$defs": {
        "At": {
            "type": "object",
            "properties": {"hour": {"type": "integer"}},
            "required": ["hour"],
            "additionalProperties": False,
        }
    },
}
#: A schema by which any model comes to an end soon.
SHORT = {
    "type": "object",
    "properties": {"unit": {"enum": ["c", "f"]}, "on": {"type": "boolean"}},
    "required": ["unit", "on"],
    "additionalProperties": False,
}


def tool(name: str, parameters: Any = None, **others: Any) -> dict[str, Any]:
    given = {} if parameters is None else {"parameters": parameters}
    return {"type": "function", "function": {"name": name, **given, **others}}


WEATHER, NOW = tool("weather", SCHEMA), tool("now")


def call_of(form: str, name: str, **arguments: Any) -> str:
    """A call as the model writes it."""
    if form == "JSON":
        return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"
    if form == "tags":
        texts = {k: v if isinstance(v, str) else json.dumps(v) for k, v in arguments.items()}
        tags = "".join(f"<parameter={k}>\n{v}\n</parameter>\n" for k, v in texts.items())
        return f"<tool_call>\n<function={name}>\n{tags}</function>\n</tool_call>"
    return f"<|tool_call>call:{name}{bare(arguments)}<tool_call|>"


def bare(value: Any) -> str:
    if isinstance(value, dict):
        return f"{{{','.join(f'{k}:{bare(v)}' for k, v in value.items())}}}"
    if isinstance(value, list):
        return f"[{','.join(map(bare, value))}]"
    return f'<|"|>{value}<|"|>' if isinstance(value, str) else json.dumps(value)


def thought(form: str, text: str) -> str:
    return f"{THOUGHT}{text}<channel|>" if form == GEMMAS else f"<think>{text}</think>"


def trained(marks: list[str]) -> PreTrainedTokenizerFast:
    """A tokenizer of calls, whose tokens go across what is fixed and what is free in them."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    alphabet, special = pre_tokenizers.ByteLevel.alphabet(), ["<pad>", "<s>", "</s>"]
    trainer = BpeTrainer(vocab_size=500, special_tokens=special, initial_alphabet=alphabet)
    calls = [call_of(form, "weather", **arguments) for form in TEMPLATES for arguments in GOOD]
    made.train_from_iterator(calls * 5, trainer)
    found = PreTrainedTokenizerFast(tokenizer_object=made, eos_token="</s>")
    found.add_tokens(marks)
    return found


class Held:
    """What the grammar of a form allows; with `special` its marks are tokens that are no text."""

    def __init__(self, form: str, special: bool | str, *tools: Any, **asked: Any) -> None:
        marks = MARKS[form] if special else []
        self.tokenizer = trained(marks) if special == "trained" else tokenizer()
        self.tokenizer.add_tokens(marks)
        self.template, self.tools = load_response_template(TEMPLATES[form]), [*map(inlined, tools)]
        asked = {"forced": True, "parallel": True, "opened": "", **asked}
        made = partial(answer_grammar, self.template, self.tools, **asked)
        grammars = Grammars(self.tokenizer, len(self.tokenizer), [2])
        self.grammar = grammars.compiled(GrammarSource("tools", "calls", made))

    def allows(self, text: str) -> bool:
        """Whether an answer may be this text."""
        matcher = self.grammar._matcher.deep_copy()
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()

    def calls(self, text: str) -> list[tuple[str, Any]]:
        """The calls that are found in a text."""
        parser = AnswerParser(self.template, self.tools, "")
        found = [*parser.feed(text), *parser.end(cut=False)]
        closed = [e["value"] for e in found if (e["type"], e["field"]) == ("region_close", CALLS)]
        return [(call.name, json.loads(call.arguments)) for calls in closed for call in calls]


FORMS = [*product(TEMPLATES, (False, True, "trained"))]
GOOD = [
    {"city": "Oslo"[:3], "days": 2},
    {"city": "", "days": 1, "unit": "f", "at": {"hour": 7}},
    {"city": "{a:", "days": 9, "unit": None, "at": None, "tags": ["a", ",b"]},
]
BAD = [
    *({"city": "Oslo", "days": 2}, {"city": "a", "days": 0}, {"city": "a"}, {"days": 1}, {}),
    *({"city": "a", "days": 1, "unit": "k"}, {"city": "a", "days": 1, "more": 1}),
    {"city": "a", "days": 1, "at": {"hour": "x"}},
]


@pytest.mark.parametrize(("form", "special"), FORMS)
def test_a_forced_answer_is_calls_that_keep_to_their_schemas(form, special):
    held, call = Held(form, special, WEATHER, NOW), partial(call_of, form)
    for arguments in GOOD:
        text = call("weather", **arguments)
        assert held.allows(text), text
        assert held.calls(text) == [("weather", arguments)]
    for arguments in BAD:
        assert not held.allows(call("weather", **arguments)), arguments
    assert held.allows(f"{call('weather', **GOOD[0])}{call('now')}")
    assert held.allows(thought(form, "hm") + call("now"))
    for text in ("", "so", f"so{call('now')}", f"{call('now')}so", call("then"), call("now", a=1)):
        assert not held.allows(text), text
    one = Held(form, special, WEATHER, NOW, parallel=False)
    assert one.allows(call("now"))
    assert not one.allows(call("now") * 2)


@pytest.mark.parametrize(("form", "special"), FORMS)
def test_a_prompt_that_has_opened_reasoning(form, special):
    opened, ended = thought(form, "|").split("|", 1) if form != GEMMAS else (THOUGHT, "<channel|>")
    held = Held(form, special, NOW, opened=opened)
    assert held.allows(f"hm{ended}{call_of(form, 'now')}")
    assert not held.allows(call_of(form, "now"))
    assert not held.allows(f"hm{ended}so")


@pytest.mark.parametrize(("form", "special"), FORMS)
def test_strict_tools_among_others(form, special):
    """In any text, what follows the mark of a call is a call; of a strict tool by its schema."""
    strict = tool("weather", SCHEMA, strict=True)
    held = Held(form, special, strict, tool("any", SCHEMA), forced=False)
    call = partial(call_of, form)
    good, bad, other = call("weather", **GOOD[1]), call("weather", **BAD[0]), call("any", city=3)
    # Reasoning is text, which may be a call where marks are letters.
    before = thought(form, "hm" if special else good)
    for text in ("", "so\n", good, f"so {good}\nthen{other}", before + good, other):
        assert held.allows(text), text
    for text in (bad, f"so {bad}", f"{good}{bad}", f"{thought(form, 'hm')}{bad}", call("now")):
        assert not held.allows(text), text
    # In the place of a call, there may be what the answer has to keep to.
    held = Held(form, special, strict, forced=False, schema=SHORT)
    for text in (good, json.dumps({"unit": "c", "on": True}), thought(form, "hm") + good):
        assert held.allows(text), text
    for text in ("so", bad, json.dumps({"unit": "k", "on": True})):
        assert not held.allows(text), text


def test_a_mark_that_is_spelled():
    """A call that is found in the letters of a text is held, too."""
    held = Held("JSON", True, tool("weather", SCHEMA, strict=True), forced=False)
    matcher = held.grammar._matcher.deep_copy()
    for sign in "<tool_call>":
        assert matcher.consume_tokens(held.tokenizer(sign, add_special_tokens=False)["input_ids"])
    allowed = [i for i, bias in enumerate(matcher.compute_logit_bias()) if bias]
    assert {held.tokenizer.decode([i]) for i in allowed} <= {"{", "\n", " ", "\t", "\r"}


TREE = {
    "type": "object",
    "properties": {"of": {"type": "array", "items": {"$ref": "#/$defs/T"}}},
    "$defs": {"T": {"type": "object", "properties": {"t": {"$ref": "#/$defs/T"}}}},
}


def with_calls(form: str, **changes: Any) -> Any:
    """A template whose field of calls is another."""
    fields = TEMPLATES[form]["fields"]
    calls = {k: v for k, v in (fields["tool_calls"] | changes).items() if v is not None}
    return {**TEMPLATES[form], "fields": {**fields, "tool_calls": calls}}


@pytest.mark.parametrize(
    ("form", "tools"),
    [
        (GEMMAS, tool("f", TREE)),
        (GEMMAS, tool("get-weather")),
        (GEMMAS, tool("f", {"type": "object"})),
        ("tags", tool("f", {"type": "object", "properties": {"a>b": {"type": "string"}}})),
        ("tags", tool("f", {"type": "object", "properties": {"a": {"format": "date"}}})),
        ("JSON", tool("f", {"type": "object", "properties": {"a": {"type": "nothing"}}})),
    ],
)
def test_what_a_form_has_no_place_for_is_refused(form, tools):
    with pytest.raises(RequestError, match="`tools`"):
        Held(form, False, tools)


@pytest.mark.parametrize("form", TEMPLATES)
def test_many_arguments_and_references(form):
    """What a schema takes does not grow by powers."""
    twice = {"type": "object", "properties": {x: {"$ref": "#/$defs/d0"} for x in "ab"}}
    twice["$defs"] = {
        f"d{i}": {"type": "object", "properties": {x: {"$ref": f"#/$defs/d{i + 1}"} for x in "ab"}}
        for i in range(40)
    }
    twice["$defs"]["d40"] = {"type": "null"}
    assert inlined(tool("f", twice)) == tool("f", twice)
    many = {"type": "object", "properties": {f"x{i}": {"type": "null"} for i in range(60)}}
    held = Held(form, False, tool("f", many))
    assert held.allows(call_of(form, "f", x3=None, x7=None, x59=None))
    assert not held.allows(call_of(form, "f", x7=None, x3=None))


@pytest.mark.parametrize("form", TEMPLATES)
@pytest.mark.parametrize(("least", "most"), [(0, 0), (0, 1), (1, 1), (1, 2)])
def test_how_many_items_an_array_has(form, least, most):
    array = {"type": "array", "items": {"type": "null"}, "minItems": least, "maxItems": most}
    held = Held(form, False, tool("f", {"type": "object", "properties": {"a": array}}))
    for count in range(4):
        assert held.allows(call_of(form, "f", a=[None] * count)) == (least <= count <= most)


def test_schemas_within_themselves():
    held = Held("JSON", False, tool("f", TREE))
    assert held.allows(call_of("JSON", "f", of=[{"t": {"t": {}}}]))
    assert not held.allows(call_of("JSON", "f", of=[{"t": 3}]))


@pytest.mark.parametrize(
    "changes",
    [
        {"content": "kv-lines"},
        {"open_pattern": None, "open": ["<a>", "<b>"]},
        {"content": "xml-inline", "content_args": {"tag_pattern": "(?P<value>.*)"}},
        {"transform": {"type": "function", "function": {"name": "{content.a.b}"}}},
    ],
)
def test_forms_that_no_grammar_tells(spoken, changes):
    server = spoken("{{ messages }}{{ tools }}", with_calls("JSON", **changes))
    body = question(CHAT, "a", 5, tools=[NOW], tool_choice="required")
    answer = ask(server, "POST", CHAT, model="tiny", **body)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == "tool_choice"
    assert '`tool_choice` "auto"' in answer.json()["error"]["message"]


LIGHT, FAN = tool("light", SHORT), tool("fan", SHORT)
CHOICES = {
    "required": ("tool_calls", "required"),
    "named": ("stop", {"type": "function", "function": {"name": "light"}}),
    "allowed": (
        "tool_calls",
        {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [LIGHT]}},
    ),
}


def flat(asked: Any) -> Any:
    """What a chat nests, as /v1/responses has it."""
    if not isinstance(asked, dict):
        return asked
    inner = asked.get("function") or asked.get("allowed_tools")
    nested = {key: [*map(flat, value)] if key == "tools" else value for key, value in inner.items()}
    return {"type": asked["type"], **nested}


@pytest.mark.parametrize("form", TEMPLATES)
@pytest.mark.parametrize("choice", CHOICES)
def test_forced_calls_of_a_model(spoken, form, choice):
    """Of a model that has learnt nothing of tools; plain and streamed alike, on both routes."""
    kept = {k: v for k, v in TEMPLATES[form]["fields"].items() if k != "reasoning_content"}
    server = spoken("{{ messages }}{{ tools }}", {**TEMPLATES[form], "fields": kept})
    reason, asked = CHOICES[choice]
    fields = {"tools": [LIGHT, FAN], "parallel_tool_calls": False, "max_tokens": 400}
    body = {**question(CHAT, "a", 400, **fields), "tool_choice": asked}
    plain, stream = answers(server, [body, {**body, "stream": True}])
    (made,) = ChatCompletion.model_validate(plain.json()).choices
    assert made.finish_reason == reason
    (called,) = made.message.tool_calls
    assert called.function.name in (["light", "fan"] if choice == "required" else ["light"])
    arguments = json.loads(called.function.arguments)
    assert arguments.keys() == {"unit", "on"}
    assert (arguments["unit"] in ("c", "f"), arguments["on"] in (True, False)) == (True, True)
    found = [event["choices"][0] for event in events(stream.text)]
    assert found[-1]["finish_reason"] == reason
    (piece,) = [call for each in found for call in each["delta"].get("tool_calls", ())]
    assert piece["function"] == called.function.model_dump(exclude_none=True)
    body = question(RESPONSES, "a", 400, tools=[flat(LIGHT), flat(FAN)], tool_choice=flat(asked))
    body |= {"parallel_tool_calls": False}
    (plain,) = answers(server, [body], RESPONSES)
    assert plain.status_code == 200, plain.text
    assert plain.json()["status"] == "completed"
    (item,) = [item for item in plain.json()["output"] if item["type"] == "function_call"]
    assert (item["name"], item["arguments"]) == (called.function.name, called.function.arguments)


def test_one_grammar_for_an_answer(spoken):
    """JSON may come in the place of calls; nothing else that an answer has to keep to."""
    server, strict = spoken("{{ messages }}{{ tools }}"), [tool("light", SHORT, strict=True)]
    fields = {"tools": strict, "structured_outputs": {"choice": ["so"]}}
    answer = ask(server, "POST", CHAT, model="tiny", **question(CHAT, "a", 9, **fields))
    assert answer.json()["error"]["param"] == "structured_outputs"
    body = question(CHAT, "a", 9, tools=[LIGHT], structured_outputs={"choice": ["so"]})
    said = ask(server, "POST", CHAT, model="tiny", **body).json()["choices"][0]
    flattened = question(CHAT, "a", 3, tools=[flat(strict[0])])
    assert ask(server, "POST", CHAT, model="tiny", **flattened).status_code == 200
    assert (said["message"]["content"], said["finish_reason"]) == ("so", "stop")


def test_allowed_tools_are_those_of_the_prompt(spoken):
    server = spoken("{{ tools | tojson }}")
    only = {"mode": "auto", "tools": [{"type": "function", "function": {"name": "fan"}}]}

    def tokens(**fields: Any) -> list[int]:
        body = {"model": "tiny", "messages": [{"role": "user", "content": "a"}], **fields}
        return ask(server, "POST", "/tokenize", **body).json()["tokens"]

    chosen = {"type": "allowed_tools", "allowed_tools": only}
    assert tokens(tools=[LIGHT, FAN], tool_choice=chosen) == tokens(tools=[FAN])
    assert tokens(tools=[flat(FAN)]) == tokens(tools=[FAN])
    assert tokens(tools=[LIGHT, FAN], tool_choice="required") == tokens(tools=[LIGHT, FAN])
    none = {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": []}}
    body = question(CHAT, "a", 9, tools=[FAN], tool_choice=none)
    assert ask(server, "POST", CHAT, model="tiny", **body).status_code == 400
