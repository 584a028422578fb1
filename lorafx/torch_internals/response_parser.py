"""transformers' parser of a model's answers, with nothing of an answer lost."""

from __future__ import annotations

import json
from typing import Any

import regex
from transformers.cli.serving.utils import ToolCall, get_response_template
from transformers.utils.chat_parsing import ResponseParser
from transformers.utils.chat_parsing.response_templates import (
    ResponseTemplate,
    load_response_template,
)

from lorafx.errors import ConfigError

#: The field of a response template that has calls of tools.
CALLS = "tool_calls"


def response_template(tokenizer: Any, model: Any = None) -> ResponseTemplate | None:
    """The response template of a tokenizer, or that which transformers has for the kind of `model`;
    None if there is none. Raises ConfigError if it is invalid."""
    saved = getattr(tokenizer, "response_template", None)
    if saved is None and model is not None:
        saved = get_response_template(tokenizer, model)
    try:
        return None if saved is None else load_response_template(saved)
    except Exception as error:  # it raises errors of many classes
        raise ConfigError(
            f"transformers cannot read the response_template of {tokenizer.name_or_path} ({error})"
            "; correct it in tokenizer_config.json, or take it out"
        ) from error


class AnswerParser(ResponseParser):
    """Finds the regions of an answer by a response template, as events. The value of the event that
    closes calls is a list of `ToolCall`. What stands between the marks of a call but is not a
    call is content, marks included.
    """

    def __init__(
        self, template: ResponseTemplate, tools: list[dict[str, Any]] | None, opened: str
    ) -> None:
        """`opened` is the mark of a region in which the prompt has ended, or "". Nothing else of
        the prompt may come here: transformers' parser repeats a prefix as part of the answer."""
        super().__init__(template, prefix="", tools=list(tools or ()))
        self._mark, self._cut = (0, 0), False
        self.feed(opened)

    def end(self, cut: bool) -> list[dict[str, Any]]:
        """The events at the end of the answer. If it was `cut`, a call that is not closed is
        none."""
        self._cut = cut
        events: list[dict[str, Any]] = []
        self._process(events, eos=True)
        return events

    def _open_explicit(self, events: list[dict], field: Any, m: Any) -> None:
        super()._open_explicit(events, field, m)
        self._mark = m.span()

    def _close_current(self, events: list[dict]) -> None:
        if self._current != CALLS or not self._opened:
            super()._close_current(events)
            return
        (begins, inside), before = self._mark, len(events)
        try:
            if self._cut and self._pos <= inside + len(self._body):
                raise ValueError("the answer ends within the call")
            self._check_tags()
            super()._close_current(events)
            events[-1]["value"] = _calls(events[-1]["value"])
        except Exception:  # whatever parsers of JSON and patterns raise for a text that is no call
            text = self._buffer[begins : self._pos]
            events[before:] = [{"type": "region_chunk", "field": "content", "text": text}]
            self._reset_to_implicit()

    def _check_tags(self) -> None:
        """Raise ValueError if text of a call is in none of its tags: it would be lost."""
        tag = self._spec.fields[CALLS].content_args.get("tag_pattern")
        if tag and regex.sub(tag, "", self._body, flags=regex.DOTALL).strip():
            raise ValueError("a call has text outside of its tags")


def _calls(value: Any) -> list[ToolCall]:
    """The calls in what a template has made of a text. Raises an exception if there are none."""
    calls = []
    for call in value if isinstance(value, list) else [value]:
        name, arguments = call["function"]["name"], call["function"]["arguments"]
        arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
        if not isinstance(name, str) or not name or not isinstance(arguments, dict):
            raise TypeError("a call has a name, and an object of arguments")
        name.encode()  # half of a surrogate pair is not text
        calls.append(ToolCall(name, json.dumps(arguments, allow_nan=False)))
    if not calls:
        raise ValueError("there is no call")
    return calls
