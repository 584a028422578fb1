"""Values of an adapter's configuration, each checked for type and range."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence, Set
from typing import Any

from lorafx.adapter_store.config_source import short
from lorafx.model.targets import Pattern, PatternError, is_all_linear, pattern

# Names of lists of layers: "layers", "h", "model.layers". PEFT would take a regular expression.
_LAYER_NAME = re.compile(r"(\\?[.]|[\w-]){1,256}")
_MOST_LAYER_NAMES = 64
# No module has as many dimensions; s = α/r is kept in float32.
_LARGEST_RANK = 1 << 40
_LARGEST_ALPHA = 3e38
_LARGEST_TOKEN = (1 << 31) - 1
#: Patterns of one field, and those of them that are tried on every module: milliseconds for each.
_MOST_PATTERNS, _MOST_TRIED = 1 << 14, 512


def keyed(key: str) -> Pattern:
    """What a key of `rank_pattern` or `alpha_pattern` matches whole.

    Raises:
        PatternError: see `Pattern`.
    """
    name = re.search(r"(\\?)(\w*)\$?$", key)
    assert name is not None
    open_ended = set(key) & set("|()[]{}")  # it may end in several ways
    tail = "" if open_ended else name[2][1:] if name[1] else name[2]
    return Pattern(rf"(.*\.)?({key})", tail)


def is_off(value: Any) -> bool:
    """Null, false or nothing: how every PEFT version spells a feature that is not used."""
    if value is None or value is False:
        return True
    return isinstance(value, str | Sequence | Mapping | Set) and len(value) == 0


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


class Values:
    """Raw fields by name. What is not what it must be is noted in `malformed`."""

    def __init__(self, values: dict[str, Any], where: str) -> None:
        self.values, self.where = values, where
        self.malformed: list[str] = []

    def _given(self, name: str, default: Any) -> Any:
        value = self.values.get(name)
        return default if is_off(value) else value

    def _flag(self, name: str) -> bool:
        value = self.values.get(name)
        if value is None or (isinstance(value, int) and value in (0, 1)):
            return bool(value)
        self.malformed.append(f"{name} must be true or false, it is {short(value)}")
        return False

    def _text(self, name: str) -> str | None:
        value = self.values.get(name)
        if value is not None and not isinstance(value, str):
            self.malformed.append(f"{name} must be a string, it is {short(value)}")
        return value or None if isinstance(value, str) else None

    def _rank(self, name: str, value: Any) -> int:
        if isinstance(value, int) and not isinstance(value, bool) and 0 < value <= _LARGEST_RANK:
            return value
        self.malformed.append(f"{name} must be a positive integer, it is {short(value)}")
        return 1

    def _alpha(self, name: str, value: Any) -> float:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if number and -_LARGEST_ALPHA <= value <= _LARGEST_ALPHA:
            return value
        self.malformed.append(f"{name} must be a finite number, it is {short(value)}")
        return 0

    def _patterns(self, name: str, check: Any) -> dict[str, Any]:
        patterns = self._given(name, {})
        if not isinstance(patterns, Mapping):
            self.malformed.append(
                f"{name} must map module names to numbers, it is {short(patterns)}"
            )
            return {}
        tried = 0
        for key in patterns:
            found = self._regex(f"{name} key", key, keyed)
            if found is None:
                return {}
            tried += not found.tail
            if len(patterns) > _MOST_PATTERNS or tried > _MOST_TRIED:
                self.malformed.append(
                    f"{name} has {len(patterns)} patterns; there may be {_MOST_PATTERNS}, and "
                    f"{_MOST_TRIED} that do not end in a name"
                )
                return {}
        return {key: check(f"{name}[{short(key)}]", value) for key, value in patterns.items()}

    def _names(self, name: str) -> str | tuple[str, ...] | None:
        value = self.values.get(name)
        if value is None:
            return None
        if isinstance(value, str):
            if not is_all_linear(value):
                self._regex(name, value)
            return value
        if isinstance(value, list | tuple | set) and all(isinstance(v, str) for v in value):
            return tuple(sorted(value))
        self.malformed.append(f"{name} must be a string or a list of strings, it is {short(value)}")
        return None

    def _endings(self, name: str) -> tuple[str, ...]:
        """A list of names, none of them empty."""
        value = self._given(name, ())
        if isinstance(value, list | tuple | set) and all(isinstance(v, str) and v for v in value):
            return tuple(sorted(value))
        self.malformed.append(f"{name} must be a list of names, it is {short(value)}")
        return ()

    def _tokens(self, name: str) -> dict[str, tuple[int, ...]]:
        """Lists of token ids by the ending of a module's name; one list alone is under ""."""
        value = self._given(name, {})
        lists = value if isinstance(value, Mapping) else {"": value}
        found: dict[str, tuple[int, ...]] = {}
        for ending, ids in lists.items():
            known = isinstance(ending, str) and isinstance(ids, list | tuple)
            if not known or not all(_is_count(i) and i <= _LARGEST_TOKEN for i in ids):
                self.malformed.append(
                    f"{name} must be a list of token ids, or one for each name of a module; it is "
                    f"{short(value)}"
                )
                return {}
            if len(set(ids)) < len(ids):
                self.malformed.append(f"{name} names a token twice: {short(value)}")
                return {}
            found[ending] = tuple(ids)
        return found

    def _token_ids(self, name: str) -> tuple[int, ...]:
        value = self._given(name, ())
        if isinstance(value, list | tuple) and all(
            _is_count(i) and i <= _LARGEST_TOKEN for i in value
        ):
            return tuple(value)
        self.malformed.append(f"{name} must be a list of token ids, it is {short(value)}")
        return ()

    def _parameters(self) -> tuple[str, ...]:
        value = self._given("target_parameters", ())
        if isinstance(value, list | tuple | set) and all(isinstance(v, str) for v in value):
            return tuple(sorted(value))
        self.malformed.append(f"target_parameters must be a list of strings, it is {short(value)}")
        return ()

    def _layers(self, value: Any) -> tuple[int, ...]:
        layers = [value] if isinstance(value, int) else value
        if isinstance(layers, list | tuple) and all(isinstance(i, int) for i in layers):
            return tuple(layers)
        self.malformed.append(f"layers_to_transform must be integers, it is {short(value)}")
        return ()

    def _layer_names(self) -> tuple[str, ...]:
        value = self._given("layers_pattern", ())
        found = (value,) if isinstance(value, str) else value
        if (
            isinstance(found, list | tuple)
            and len(found) <= _MOST_LAYER_NAMES
            and all(isinstance(name, str) and _LAYER_NAME.fullmatch(name) for name in found)
        ):
            return tuple(found)
        self.malformed.append(
            "layers_pattern must be the name, or a few names, of lists of layers, it is "
            f"{short(value)}"
        )
        return ()

    def _regex(
        self, name: str, text: Any, build: Callable[[str], Pattern] = pattern
    ) -> Pattern | None:
        try:
            if isinstance(text, str):
                return build(text)
            self.malformed.append(f"{name} {short(text)} is not a regular expression")
        except PatternError as exc:
            self.malformed.append(f"{name} {short(text)} {exc}")
        return None
