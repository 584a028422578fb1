"""Grammars of answers that call tools, in Lark's notation as llguidance reads it. The form of a
call is that in which the model's response template finds it.

forced:  reasoning? call+
allowed: reasoning? (text call)* text, where a call follows each mark of one
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from functools import reduce
from operator import getitem
from typing import Any

import regex
from transformers.utils.chat_parsing.response_templates import ResponseTemplate

from lorafx.integrations.server.texts import REASONING
from lorafx.torch_internals.response_parser import CALLS

#: A named group that has no group within, and what it matches.
_GROUP = regex.compile(r"\(\?P?<(\w+)>((?:[^][()\\]|\\.|\[(?:[^]\\]|\\.)*\])*)\)")
_TEXT, _SPACE = "(?s:.*)", r"/[ \t\r\n]{0,2}/"
#: The most values that a tool may have once its references are inlined.
_MOST = 2_000
#: Keywords that constrain nothing, and those that are enforced where values are not JSON.
_ANNOTATIONS = {"$defs", "$schema", "default", "description", "examples", "title", "type"}
_ENFORCED = {
    "array": {"items", "minItems", "maxItems"},
    "object": {"properties", "required", "additionalProperties"},
    "string": {"enum", "const", "minLength", "maxLength"},
}


def answer_grammar(
    template: ResponseTemplate,
    tools: Sequence[dict[str, Any]],
    special: Mapping[str, int],
    *,
    forced: bool,
    parallel: bool,
    opened: str,
    schema: Any = None,
) -> str:
    """The grammar of an answer that calls one of `tools`, or several if `parallel`.

    If calls are `forced`, the answer is nothing else, and their arguments keep to the schemas of
    the tools. If not, those of strict tools do; calls stand in any text, or in place of JSON that
    keeps to a `schema`. `special` are the special tokens by their names; `opened` is the mark of
    the block of reasoning in which the prompt ends, or "". Raises ValueError if there is no such
    grammar.
    """
    rules = _Rules(special)
    try:
        form = _CallForm(template, rules)
        called = " | ".join(form.call(tool["function"], strict=forced) for tool in tools)
        thought = _reasoning(template, rules, opened)
        parallel = parallel and template.fields[CALLS].repeats
        if forced or schema is not None:
            answer = f"({rules.pattern(form.head)} ({called})){'+' if parallel else ''}"
        else:
            answer = f"({rules.until(form.head)} ({called})){'*' if parallel else '?'} /{_TEXT}/"
    except (AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
        why = f"it needs {error}" if isinstance(error, KeyError) else error
        raise ValueError(
            f"the form of this model's calls cannot be held to a grammar ({why}); send tools "
            'without `strict` and `response_format`, and the `tool_choice` "auto"'
        ) from error
    if schema is not None and not forced:
        answer = f"({answer} | {_SPACE} %json {json.dumps(schema)})"
    return "\n".join([f"start: {thought} {answer}", *rules.all])


def inlined(tool: dict[str, Any]) -> dict[str, Any]:
    """A tool whose schema has no references, unless they are recursive or too many: transformers'
    parser does not follow them to the types of arguments."""
    try:
        left = iter(range(_MOST))
        found: dict[str, Any] = _inlined(tool, tool["function"].get("parameters"), left)
    except (KeyError, RecursionError, StopIteration, TypeError):
        return tool
    return found


def _inlined(value: Any, root: Any, left: Iterator[int]) -> Any:
    next(left)
    if isinstance(value, list):
        return [_inlined(item, root, left) for item in value]
    if not isinstance(value, dict):
        return value
    if isinstance(reference := value.get("$ref"), str):
        found = reduce(getitem, reference.removeprefix("#/").split("/"), root)
        return _inlined({**found, **{k: v for k, v in value.items() if k != "$ref"}}, root, left)
    return {key: _inlined(item, root, left) for key, item in value.items() if key != "$defs"}


class _Rules:
    """The rules of a grammar. `special` are the special tokens by their names."""

    def __init__(self, special: Mapping[str, int]) -> None:
        self.all: list[str] = []
        self._special = {n: i for name, i in special.items() for n in (name, regex.escape(name))}
        names = map(regex.escape, sorted(self._special, key=len, reverse=True))
        self._names = regex.compile(f"({'|'.join(names) or '(?!)'})")

    def rule(self, body: str, options: str = "") -> str:
        """The name of a new rule."""
        self.all.append(f"r{len(self.all)}{options}: {body}")
        return f"r{len(self.all) - 1}"

    def pattern(self, source: str) -> str:
        """What matches a regular expression, in which special tokens may be named."""
        pieces = self._names.split(source)
        if len(pieces) > 1 and any(regex.search(r"(?<!\\)\|", text) for text in pieces[::2]):
            raise ValueError(f"{source!r:.80} has alternatives with special tokens")
        return " ".join(
            f"<[{self._special[piece]}]>" if index % 2 else _terminal(piece)
            for index, piece in enumerate(pieces)
            if piece
        )

    def until(self, end: str, text: str = _TEXT) -> str:
        """Text up to the first match of `end`, whether in special tokens or in their letters."""
        letters = self.rule(_terminal(f"(?:{text})(?:{end})"), "[lazy]")
        found = self.pattern(end := end.removeprefix(r"\s*"))
        if found.startswith("<"):
            return f"({letters} | /{text}/ {found})"
        if "<[" in found:
            raise ValueError(f"{end!r:.80} has text before a special token")
        return letters

    def beyond(self, end: str) -> str:
        """Anything, special tokens included, up to the last special token of `end`."""
        found = regex.findall(r"<\[\d+\]>", self.pattern(end))
        if not found:
            return self.until(end)
        # Text first: a token may stand across what is before and this.
        return f"/{_TEXT}/ {found[-1].replace('[', '[^')}* {found[-1]}"


class _CallForm:
    """The form of a call. `head` is the pattern of its beginning, up to the name of the tool if
    that stands in the mark."""

    def __init__(self, template: ResponseTemplate, rules: _Rules) -> None:
        self._field = field = template.fields[CALLS]
        self._rules, self._args = rules, field.content_args
        if len(field.open_literals or "1") > 1 or field.transform_each:
            raise ValueError("they begin in several ways, or are lists")
        close = field.close_literals
        self._close = regex.escape(close[0]) if close else field.close_re.pattern
        self.head, self._name, self._rest = field.open_re.pattern, "", ""
        if field.open_re.groupindex:
            self.head, _, self._name, self._rest = _GROUP.split(self.head)
        function = _inside(field.transform or "{content}", "function")
        places = (_inside(function, part)[1:-1].split(".")[1:] for part in ("name", "arguments"))
        self._of_name, self._of_arguments = places
        self._marks = next(iter(self._args.get("string_delims") or ()), None)

    def call(self, tool: dict[str, Any], *, strict: bool) -> str:
        """The rule of a call behind `head`. Its arguments keep to the tool's schema if the call or
        the tool is `strict`."""
        name, rules, kind = tool["name"], self._rules, self._field.content
        strict = strict or tool.get("strict") is True
        nothing = {"type": "object", "properties": {}, "additionalProperties": False}
        schema = (tool.get("parameters") or nothing) if strict else {"type": "object"}
        begin = rules.pattern(_named(name, self._name) + self._rest) if self._name else ""
        if self._name and not strict:
            return rules.rule(f"{begin} {rules.beyond(self._close)}")
        if kind not in ("json", "xml-inline"):
            raise ValueError(f"they are {kind!r}")
        body = self._value(self._whole(name, schema)) if kind == "json" else self._tags(schema)
        return rules.rule(f"{begin} {_SPACE} {body} {_SPACE} {rules.pattern(self._close)}")

    def _whole(self, name: str, arguments: dict[str, Any]) -> dict[str, Any]:
        """The schema of the JSON in a call."""
        if not self._of_arguments:
            return arguments
        (key,) = self._of_arguments
        named = {} if self._name else {self._of_name[0]: {"const": name}}
        members = {**named, key: arguments}
        whole = {"type": "object", "properties": members, "required": [*members]}
        return {**whole, "additionalProperties": False, "$defs": arguments.get("$defs", {})}

    def _tags(self, schema: dict[str, Any]) -> str:
        """Arguments as tags, in the order of the schema."""
        begin, _, key, between, _, _, end = _GROUP.split(self._args["tag_pattern"])
        rules, tags = self._rules, []
        if self._args.get("value_parser"):
            raise ValueError("values in tags have a form of their own")
        if "properties" not in schema:
            return f"({_SPACE} {rules.pattern(begin + key + between)} {rules.until(end)})*"
        for name, found in schema["properties"].items():
            options = _alternatives(found)
            texts = [_text(option) for option in options if _kind(option) == "string"]
            if texts:  # also of null: without quotes all are texts
                texts += ["null" for option in options if _kind(option) == "null"]
                inside = rules.until(end, "|".join(texts))
            else:
                inside = f"{_json(found)} {rules.pattern(end)}"
            tag = f"({_SPACE} {rules.pattern(begin + _named(name, key) + between)} {inside})"
            tags.append(tag if name in schema.get("required", ()) else f"{tag}?")
        return " ".join(tags)

    def _value(self, schema: dict[str, Any]) -> str:
        """JSON by a schema, or the model's own notation of it, with other marks of strings."""
        if self._marks:
            return f"({' | '.join(map(self._unquoted, _alternatives(schema)))})"
        if self._args.get("unquoted_keys"):
            raise ValueError("strings may look like keys")
        return _json(schema)

    def _unquoted(self, schema: dict[str, Any]) -> str:
        """Values that keep to a schema of one type, though perhaps not all that do."""
        kind, rules = _kind(schema), self._rules
        if kind == "string":
            return self._string(_text(schema))
        if kind not in _ENFORCED:  # a number, true, false or null
            return _json(schema)
        _check_enforced(schema, kind)
        if kind == "array":
            least, most = schema.get("minItems", 0), schema.get("maxItems", "")
            if most == 0:
                return '"[]"'
            item = rules.rule(self._value(schema["items"]))
            times = f"{max(least - 1, 0)},{most and most - 1}"
            more = "" if most == 1 else f'("," {item}){{{times}}}'  # llguidance has no {0,0}
            return f'"[" ({item} {more}){"" if least else "?"} "]"'
        members, needed = schema["properties"], schema.get("required", ())
        made = {name: rules.rule(self._member(name, members[name])) for name in members}
        # Required members come first. If there are none, any of the others may be the first.
        begun = ['"," '.join(f"{made[name]} " for name in needed)] if needed else list[str]()
        rest = ""
        for name in reversed([name for name in members if name not in needed]):
            begun = begun if needed else [f"{made[name]} {rest}", *begun]
            rest = rules.rule(f'("," {made[name]})? {rest}')
        if needed:
            return f'"{{" {begun[0]} {rest} "}}"'
        return f'"{{" ({" | ".join(begun)})? "}}"' if begun else '"{}"'

    def _member(self, name: str, schema: dict[str, Any]) -> str:
        bare = self._args.get("unquoted_keys") and regex.fullmatch(r"\w+", name)
        key = self._rules.pattern(name) if bare else self._string(regex.escape(name))
        return f'{key} ":" {self._value(schema)}'

    def _string(self, text: str) -> str:
        begin, end = map(regex.escape, self._marks or ())
        return f"{self._rules.pattern(begin)} {self._rules.until(end, text)}"


def _reasoning(template: ResponseTemplate, rules: _Rules, opened: str) -> str:
    """An optional block of reasoning, or the rest of one that is `opened`."""
    blocks = []
    for field in (template.fields[name] for name in sorted(REASONING & template.fields.keys())):
        if field.open_re is None or field.close_re is None:
            continue
        end = rules.until(field.close_re.pattern)
        if opened and field.open_re.fullmatch(opened):
            return end
        begin = rules.pattern(field.open_re.pattern)
        lazy = begin.startswith("/")  # a pattern, not a token
        blocks.append(f"{rules.rule(begin, '[lazy]') if lazy else begin} {end}")
    return f"({' | '.join(blocks)})?" if blocks else ""


def _alternatives(schema: dict[str, Any]) -> list[dict[str, Any]]:
    """Schemas of one type each, one of which a value has to keep to."""
    for keyword in ("anyOf", "oneOf"):
        if keyword in schema:
            if schema.keys() - _ANNOTATIONS - {keyword}:
                raise ValueError(f"no place for `{keyword}` beside other keywords of a schema")
            return [option for each in schema[keyword] for option in _alternatives(each)]
    kinds = schema.get("type")
    return [{**schema, "type": k} for k in kinds] if isinstance(kinds, list) else [schema]


def _kind(schema: dict[str, Any]) -> str:
    values = schema.get("enum", [schema.get("const")])
    texts = all(isinstance(value, str) for value in values)
    return "string" if texts else str(schema["type"])


def _check_enforced(schema: dict[str, Any], kind: str) -> None:
    if unknown := schema.keys() - _ENFORCED[kind] - _ANNOTATIONS:
        raise ValueError(f"no place for the `{min(unknown)}` of a schema")


def _text(schema: dict[str, Any]) -> str:
    """The regular expression of a string's letters."""
    _check_enforced(schema, "string")
    if "enum" in schema or "const" in schema:
        values = schema.get("enum", [schema.get("const")])
        return "|".join(regex.escape(value) for value in values if isinstance(value, str))
    return f"(?s:.{{{schema.get('minLength', 0)},{schema.get('maxLength', '')}}})"


def _named(name: str, pattern: str) -> str:
    if not regex.fullmatch(pattern, name):
        raise ValueError(f"no place for the name {name!r:.80}")
    return str(regex.escape(name))


def _inside(transform: Any, name: str) -> Any:
    return f"{transform[:-1]}.{name}}}" if isinstance(transform, str) else transform[name]


def _json(schema: Any) -> str:
    """JSON in a line: a model that may write white space may do so for ever."""
    spaces = {"whitespace_flexible": False, "item_separator": ", ?", "key_separator": ": ?"}
    return f"%json {json.dumps({**schema, 'x-guidance': spaces})}"


def _terminal(source: str) -> str:
    """A regular expression as a terminal, in which white space has an end."""
    source = source.replace(r"\s*", _SPACE[1:-1]).replace("\\\n", r"\n").replace("\n", r"\n")
    return "/" + regex.sub(r"(?<!\\)/", r"\/", source) + "/"
