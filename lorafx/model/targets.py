"""Which paths a target specification names, by PEFT's rules.

    str           re.fullmatch(spec, path), with a time limit
    "all-linear"  every eligible linear module but the output embedding (any letter case)
    list          path == entry, or path ends with "." + entry

A module with several paths is named if one of them is. Patterns in adapters are not trusted, and
`re` backtracks for minutes over `(a|a)*b` on thirty letters; the `regex` package gives a pattern
the same meaning, and has a time limit.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from functools import cached_property, lru_cache
from typing import Self

import regex
from torch import nn

from lorafx.errors import ConfigError, nearest

ALL_LINEAR = "all-linear"


class Entries(tuple[str, ...]):
    """Module names and dotted suffixes of paths, looked up by the suffixes of a path."""

    @cached_property
    def as_set(self) -> frozenset[str]:
        return frozenset(self)


class SavedTargets(Entries):
    """The modules of a checkpoint: a full path names that module only, whatever its suffixes."""


class AdapterNames(SavedTargets):
    """The modules of the given adapters, if the user names none.

    Attributes:
        adapters: module -> the name of an adapter that has it.
    """

    adapters: Mapping[str, str]

    @classmethod
    def of(cls, adapters: Mapping[str, str]) -> Self:
        names = cls(adapters)
        names.adapters = adapters
        return names


def is_all_linear(spec: str | Sequence[str] | None) -> bool:
    return isinstance(spec, str) and spec.lower() == ALL_LINEAR


def checked(spec: str | Collection[str] | None, field: str) -> str | tuple[str, ...] | None:
    """`spec` as a str, a tuple of str or None; ConfigError for other types and bad patterns."""
    if spec is None:
        return None
    if isinstance(spec, str):
        try:
            pattern(spec)
        except PatternError as error:
            raise ConfigError(f"{field}={spec!r:.120} {error}") from error
        return spec
    if not isinstance(spec, Collection) or not all(isinstance(entry, str) for entry in spec):
        raise ConfigError(
            f"{field} must be a list of module names, one regular expression or "
            f"{ALL_LINEAR!r}, got {spec!r}"
        )
    return spec if isinstance(spec, Entries) else Entries(spec)


def suffixes(path: str) -> Iterator[str]:
    """The entries of a list that name `path`: itself and its dotted suffixes."""
    while True:
        yield path
        _, dot, path = path.partition(".")
        if not dot:
            return


def names(spec: str | Sequence[str], paths: Iterable[str]) -> bool:
    """Whether `spec` (not "all-linear") names a module that these paths reach."""
    if isinstance(spec, str):
        return any(map(pattern(spec).fullmatches, paths))
    index = spec.as_set if isinstance(spec, Entries) else frozenset(spec)
    return any(suffix in index for path in paths for suffix in suffixes(path))


def output_embedding(model: nn.Module) -> nn.Module | None:
    """The module that maps to the vocabulary, for models that declare it."""
    return _embedding(model, "get_output_embeddings")


def input_embedding(model: nn.Module) -> nn.Module | None:
    """The module that looks tokens up, for models that declare it (Dia's raises)."""
    return _embedding(model, "get_input_embeddings")


def _embedding(model: nn.Module, name: str) -> nn.Module | None:
    getter = getattr(model, name, None)
    try:
        embedding = getter() if callable(getter) else None
    except (NotImplementedError, AttributeError):
        return None
    return embedding if isinstance(embedding, nn.Module) else None


def nearest_targets(entry: str, paths: Iterable[str]) -> str:
    if "." in entry:
        return nearest(entry, paths)
    return nearest(entry, dict.fromkeys(path.rpartition(".")[2] for path in paths))


#: Longest pattern: parsing time is quadratic in the length of a prefix shared by alternatives.
LONGEST = 1 << 15
#: Seconds for one match. Patterns written by people take microseconds.
SECONDS = 0.1
#: Largest product of a pattern's repeat counts: `regex` writes counted repeats out.
MOST_REPEATS = 1 << 16


class PatternError(ConfigError):
    """A str that is no regular expression, or takes too long; the message begins with a verb."""


class Pattern:
    """A regular expression over paths; matching paths end with `tail`. Raises PatternError."""

    def __init__(self, text: str, tail: str = "") -> None:
        if len(text) > LONGEST:
            raise PatternError(
                f"has {len(text)} characters, and patterns may have {LONGEST}; give a list of "
                "module names instead"
            )
        fault = ""
        try:
            re.compile(text)  # `regex` accepts more, which PEFT would refuse
            if math.prod(map(int, re.findall(r"(\d+)\}", text))) > MOST_REPEATS:
                fault = (
                    f"repeats over {MOST_REPEATS} times what it holds; give module names instead"
                )
            else:
                self._compiled = regex.compile(text)
        except (re.error, regex.error, OverflowError, ValueError, Warning) as error:
            fault = f"is not a regular expression: {getattr(error, 'msg', error)}"
        except RecursionError:
            fault = "has groups nested too deep"
        if fault:  # outside of the handler, whose traceback may be as deep as the stack
            raise PatternError(fault)
        self.text = text
        self.tail = tail

    def fullmatches(self, path: str) -> bool:
        """Whether `re.fullmatch(text, path)` matches; PatternError after SECONDS."""
        try:
            return self._compiled.fullmatch(path, timeout=SECONDS) is not None
        except TimeoutError:
            raise PatternError(
                f"the pattern {self.text!r:.120} takes over {SECONDS} seconds for one module "
                f"({path:.80}); give a list of module names instead"
            ) from None


@lru_cache(maxsize=64)
def pattern(text: str) -> Pattern:
    return Pattern(text)
