"""The raw fields of an adapter's configuration, and checks of their types and ranges."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence, Set
from pathlib import Path
from typing import Any, TypeAlias

from lorafx.adapter_store.hub import is_name
from lorafx.errors import CheckpointError
from lorafx.model.targets import Pattern, PatternError, is_all_linear, pattern

CONFIG_FILE = "adapter_config.json"
#: PEFT writes some kilobytes; a path for each module of the largest models takes megabytes.
_LARGEST = 1 << 26
# Names of lists of layers: "layers", "h", "model.layers". PEFT would take a regular expression.
_LAYER_NAME = re.compile(r"(\\?[.]|[\w-]){1,256}")
_MOST_LAYER_NAMES = 64
# s = α/r is kept in float32.
_LARGEST_RANK = 1 << 40
_LARGEST_ALPHA = 3e38
_LARGEST_TOKEN = (1 << 31) - 1
#: Patterns of one field, and patterns tried on every module, which take milliseconds.
_MOST_PATTERNS, _MOST_TRIED = 1 << 14, 512
_MOST_NAMES = 1 << 12


def raw_fields(source: Any) -> tuple[dict[str, Any], str]:
    """The raw fields of a folder, a mapping or a `peft.LoraConfig`, and their name in messages."""
    if isinstance(source, Mapping):
        values, where = dict(source), "adapter configuration"
    elif dataclasses.is_dataclass(source) and hasattr(source, "peft_type"):
        # Not source.to_dict(), which follows the installed PEFT; private fields are not read.
        names = [f.name for f in dataclasses.fields(source)]
        return {name: getattr(source, name) for name in names}, "peft configuration"
    elif isinstance(source, str | os.PathLike):
        values, where = _load_file(Path(source))
    else:
        raise CheckpointError(
            "an adapter configuration is a folder, a dict or a peft.LoraConfig, not "
            f"{short(source)}"
        )
    if not all(isinstance(name, str) for name in values):
        raise CheckpointError(f"{where} must map field names to values, it is {short(values)}")
    return values, where


def _load_file(folder: Path) -> tuple[dict[str, Any], str]:
    file = folder / CONFIG_FILE
    try:
        # Reading a pipe or a device would block or never end.
        absent = "" if file.is_file() else _absent(folder)
        size = 0 if absent else file.stat().st_size
    except (OSError, ValueError) as exc:
        raise CheckpointError(f"{folder} cannot be read: {exc}") from exc
    if absent:
        raise CheckpointError(absent)
    if size > _LARGEST:
        raise CheckpointError(
            f"{file} has {size} bytes, and a configuration may have at most {_LARGEST}"
        )
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, ValueError) as exc:
        raise CheckpointError(f"{file} cannot be read as JSON: {exc}") from exc
    return json_object(text, str(file)), str(file)


def _absent(folder: Path) -> str:
    if not folder.exists():
        where = (
            "give the name as a string to have it looked for on the hub"
            if is_name(str(folder))
            else 'name a folder or a file, or an adapter on the hub ("owner/name")'
        )
        return f"adapter folder {folder} does not exist; {where}"
    if not folder.is_dir():
        return f"{folder} is a file; give the folder that holds it and {CONFIG_FILE}"
    below = sorted(p.parent.name for p in folder.glob(f"*/{CONFIG_FILE}"))
    hint = f"; its subfolders with adapters are {', '.join(below)}" if below else ""
    return f"{folder} has no {CONFIG_FILE}{hint}"


def json_object(text: str, what: str) -> dict[str, Any]:
    """The JSON object in `text`."""
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


def number(value: Any) -> bool:
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


def _listed(value: Any, valid: Callable[[Any], bool]) -> bool:
    return isinstance(value, list | tuple | set) and all(map(valid, value))


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_token(value: Any) -> bool:
    return isinstance(value, int) and number(value) and 0 <= value <= _LARGEST_TOKEN


def _names_layers(value: Any) -> bool:
    given = [value] if isinstance(value, str) else value
    known = _listed(given, lambda name: _is_text(name) and bool(_LAYER_NAME.fullmatch(name)))
    return known and len(given) <= _MOST_LAYER_NAMES


def _in_order(value: Any) -> tuple[Any, ...]:
    return tuple(sorted(value))


def _several(value: Any) -> tuple[Any, ...]:
    return (value,) if isinstance(value, int | str) else tuple(value)


rank = _check(
    "a positive integer", lambda v: isinstance(v, int) and number(v) and 0 < v <= _LARGEST_RANK
)
alpha = _check("a finite number", lambda v: number(v) and abs(v) <= _LARGEST_ALPHA)
flag = _check("true or false", lambda v: isinstance(v, int) and v in (0, 1), bool)
text = _check("a string", _is_text)
bias = _check("none, lora_only or all", lambda v: v in ("none", "lora_only", "all"))
strings = _check("a list of strings", lambda v: _listed(v, _is_text), _in_order)
names = _check(
    f"a list of names, {_MOST_NAMES} at most",
    lambda v: _listed(v, lambda n: _is_text(n) and n) and len(v) <= _MOST_NAMES,
    _in_order,
)
tokens = _check(
    "a list of token ids", lambda v: not isinstance(v, set) and _listed(v, _is_token), tuple
)
layers = _check(
    "integers", lambda v: _listed(v, lambda i: isinstance(i, int)) or isinstance(v, int), _several
)
layer_names = _check("the name, or a few names, of lists of layers", _names_layers, _several)


def targets(name: str, value: Any) -> str | tuple[str, ...] | None:
    """A regular expression, "all-linear", names in order, or None."""
    if isinstance(value, str):
        if not is_all_linear(value):
            _regex(name, value, pattern)
        return value
    if value is not None and not _listed(value, _is_text):
        raise Malformed(f"{name} must be a string or a list of strings, it is {short(value)}")
    return None if value is None else _in_order(value)


def tokens_by_ending(name: str, value: Any) -> dict[str, tuple[int, ...]]:
    """Lists of token ids by the ending of a module's name; "" for a bare list."""
    lists = value if isinstance(value, Mapping) else {"": value}
    if len(lists) > _MOST_NAMES:
        raise Malformed(f"{name} has {len(lists)} lists; there may be {_MOST_NAMES}")
    found = {text(f"{name} key", ending): tokens(name, ids) for ending, ids in lists.items()}
    if any(len(set(ids)) < len(ids) for ids in found.values()):
        raise Malformed(f"{name} names a token twice: {short(value)}")
    return found


def by_pattern(check: Check) -> Check:
    """A check of numbers by patterns of module names."""

    def checked(name: str, value: Any) -> dict[str, Any]:
        if not isinstance(value, Mapping):
            raise Malformed(f"{name} must map module names to numbers, it is {short(value)}")
        tried = 0
        for key in value:
            tried += not _regex(f"{name} key", key, keyed).tail
            if len(value) > _MOST_PATTERNS or tried > _MOST_TRIED:
                raise Malformed(
                    f"{name} has {len(value)} patterns; there may be {_MOST_PATTERNS}, and "
                    f"{_MOST_TRIED} that do not end in a name"
                )
        return {key: check(f"{name}[{short(key)}]", number) for key, number in value.items()}

    return checked


def keyed(key: str) -> Pattern:
    """Compiles a key of `rank_pattern` or `alpha_pattern` for whole matches."""
    name = re.search(r"(\\?)(\w*)\$?$", key)
    assert name is not None
    open_ended = set(key) & set("|()[]{}")  # it may end in several ways
    tail = "" if open_ended else name[2][1:] if name[1] else name[2]
    return Pattern(rf"(.*\.)?({key})", tail)


def _regex(name: str, value: Any, build: Callable[[str], Pattern]) -> Pattern:
    if not isinstance(value, str):
        raise Malformed(f"{name} {short(value)} is not a regular expression")
    try:
        return build(value)
    except PatternError as exc:
        raise Malformed(f"{name} {short(value)} {exc}") from exc
