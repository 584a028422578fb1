"""Checks of the fields of an adapter's configuration, which is not trusted."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence, Set
from typing import Any, TypeAlias

from lorafx.errors import CheckpointError
from lorafx.model.targets import (
    Entries,
    Pattern,
    PatternError,
    is_all_linear,
    pattern,
)

# Names of lists of layers: "layers", "h", "model.layers". PEFT would accept regular expressions.
_LAYER_NAME = re.compile(r"(\\?[.]|[\w-]){1,256}")
_MOST_LAYER_NAMES = 64
# s = α/r is stored in float32.
_LARGEST_RANK = 1 << 40
_LARGEST_ALPHA = 3e38
_LARGEST_TOKEN = (1 << 31) - 1
#: Patterns of a field, and those that are matched with every module, which takes milliseconds.
_MOST_PATTERNS, _MOST_TRIED = 1 << 14, 512
_MOST_NAMES = 1 << 12


def json_object(text: str, what: str) -> dict[str, Any]:
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{what} cannot be read as JSON: {error!s:.200}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{what} must hold a JSON object, it holds {short(values)}")
    return values


def short(value: Any) -> str:
    """The beginning of a value's repr."""
    try:
        return f"{value!r:.80}"
    except ValueError:  # an integer of more digits than Python writes out
        return f"a {type(value).__name__} that is too long to be shown"


def is_off(value: Any) -> bool:
    """Whether a field is null, false or empty: PEFT's spellings of an unused feature."""
    if value is None or value is False:
        return True
    return isinstance(value, str | Sequence | Mapping | Set) and len(value) == 0


def is_number(value: Any) -> bool:
    """Whether `value` is a number; booleans are not."""
    return isinstance(value, int | float) and not isinstance(value, bool)


class Malformed(ValueError):
    """A field has a wrong type or range."""


#: The validated value of a named field; raises `Malformed`.
Check: TypeAlias = Callable[[str, Any], Any]


def _check(
    what: str, valid: Callable[[Any], bool], convert: Callable[[Any], Any] | None = None
) -> Check:
    def check(name: str, value: Any) -> Any:
        if not valid(value):
            raise Malformed(f"{name} must be {what}, it is {short(value)}")
        return value if convert is None else convert(value)

    return check


def _is_list_of(value: Any, valid: Callable[[Any], bool]) -> bool:
    return isinstance(value, list | tuple | set) and all(map(valid, value))


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_token(value: Any) -> bool:
    return isinstance(value, int) and is_number(value) and 0 <= value <= _LARGEST_TOKEN


def _names_layers(value: Any) -> bool:
    names = [value] if isinstance(value, str) else value
    valid = _is_list_of(names, lambda name: _is_text(name) and bool(_LAYER_NAME.fullmatch(name)))
    return valid and len(names) <= _MOST_LAYER_NAMES


def _sorted_tuple(value: Any) -> tuple[Any, ...]:
    return tuple(sorted(value))


def _as_tuple(value: Any) -> tuple[Any, ...]:
    return (value,) if isinstance(value, int | str) else tuple(value)


def optional(check: Check) -> Check:
    """`check` of a field that may be null."""
    return lambda name, value: None if value is None else check(name, value)


rank = _check(
    "a positive integer", lambda v: isinstance(v, int) and is_number(v) and 0 < v <= _LARGEST_RANK
)
count = _check(
    "an integer from 0 on",
    lambda v: isinstance(v, int) and is_number(v) and 0 <= v <= _LARGEST_RANK,
)
terms = _check(
    "an integer from 1 to 1000", lambda v: isinstance(v, int) and is_number(v) and 0 < v <= 1000
)
alpha = _check("a finite number", lambda v: is_number(v) and abs(v) <= _LARGEST_ALPHA)
seed = _check(
    "an integer of 64 bits",
    lambda v: isinstance(v, int) and is_number(v) and -(1 << 63) <= v < 1 << 64,
)
flag = _check("true or false", lambda v: isinstance(v, int) and v in (0, 1), bool)
anything = _check("anything", lambda v: True)
text = _check("a string", _is_text)
mapping = _check("an object with fields", lambda v: isinstance(v, Mapping))
bias = _check("none, lora_only or all", lambda v: v in ("none", "lora_only", "all"))
strings = _check("a list of strings", lambda v: _is_list_of(v, _is_text), _sorted_tuple)
names = _check(
    f"a list of names, {_MOST_NAMES} at most",
    lambda v: _is_list_of(v, lambda n: _is_text(n) and n) and len(v) <= _MOST_NAMES,
    _sorted_tuple,
)
tokens = _check(
    "a list of token ids", lambda v: not isinstance(v, set) and _is_list_of(v, _is_token), tuple
)
layers = _check(
    "integers",
    lambda v: _is_list_of(v, lambda i: isinstance(i, int)) or isinstance(v, int),
    lambda v: frozenset(_as_tuple(v)),
)
layer_names = _check("the name, or a few names, of lists of layers", _names_layers, _as_tuple)


def targets(name: str, value: Any) -> str | Entries | None:
    """A regular expression, "all-linear", sorted names, or None."""
    if isinstance(value, str):
        if not is_all_linear(value):
            _build_pattern(name, value, pattern)
        return value
    if value is not None and not _is_list_of(value, _is_text):
        raise Malformed(f"{name} must be a string or a list of strings, it is {short(value)}")
    return None if value is None else Entries(sorted(value))


def tokens_by_ending(name: str, value: Any) -> dict[str, tuple[int, ...]]:
    """Lists of token ids by the ending of a module's name, "" for a bare list."""
    lists = value if isinstance(value, Mapping) else {"": value}
    if len(lists) > _MOST_NAMES:
        raise Malformed(f"{name} has {len(lists)} lists; there may be {_MOST_NAMES}")
    checked = {text(f"{name} key", ending): tokens(name, ids) for ending, ids in lists.items()}
    if any(len(set(ids)) < len(ids) for ids in checked.values()):
        raise Malformed(f"{name} names a token twice: {short(value)}")
    return checked


def by_name(check: Check) -> Check:
    """A check of numbers by patterns of module names."""

    def checked(name: str, value: Any) -> dict[str, Any]:
        if not isinstance(value, Mapping):
            raise Malformed(f"{name} must map module names to numbers, it is {short(value)}")
        open_ended = 0
        for key in value:
            open_ended += not _build_pattern(f"{name} key", key, key_pattern).tail
            if len(value) > _MOST_PATTERNS or open_ended > _MOST_TRIED:
                raise Malformed(
                    f"{name} has {len(value)} patterns; there may be {_MOST_PATTERNS}, and "
                    f"{_MOST_TRIED} that do not end in a name"
                )
        return {key: check(f"{name}[{short(key)}]", number) for key, number in value.items()}

    return checked


def key_pattern(key: str) -> Pattern:
    """The pattern of a key of `rank_pattern` or `alpha_pattern`, for full matches."""
    name = re.search(r"(\\?)(\w*)\$?$", key)
    assert name is not None
    open_ended = set(key) & set("|()[]{}")  # it may end in several ways
    tail = "" if open_ended else name[2][1:] if name[1] else name[2]
    return Pattern(rf"(.*\.)?({key})", tail)


def _build_pattern(name: str, value: Any, build: Callable[[str], Pattern]) -> Pattern:
    if not isinstance(value, str):
        raise Malformed(f"{name} {short(value)} is not a regular expression")
    try:
        return build(value)
    except PatternError as exc:
        raise Malformed(f"{name} {short(value)} {exc}") from exc
