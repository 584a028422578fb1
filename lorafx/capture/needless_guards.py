"""Guards of Dynamo on what the entry of a model compares itself, or what changes no result.

A frame of an entry always belongs to the same model, and a graph serves one state of its watches
(lorafx.model.changes_watch). So these guards are dropped, which are more than half of all:

    the tables of hooks of modules      HookWatch; a hook that is no mark keeps its own guards
    marks                               they never change
    how a weight wraps other tensors    its identity; Dynamo compares it in Python, 4 µs a weight
    transformers' registry of models    fails whenever a model of another class is made
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any

from lorafx.model.marks import MARKS
from lorafx.torch_internals.compat import recorded_outputs
from lorafx.torch_internals.frames import source_text

_TABLE = re.compile(
    r"L\['self'\].*\._(forward|backward)(_pre)?_hooks(_with_kwargs|_always_called)?"
)
_WRAPPING = "TENSOR_SUBCLASS_METADATA_MATCH"
_INNER_NAMES = ".__tensor_flatten__()"


def keep_guards(
    entries: Sequence[Any], value_at: Callable[[str], Any], watched: Callable[[Any], bool]
) -> list[bool]:
    """Which of Dynamo's `GuardFilterEntry`s of a frame to keep; `value_at` looks places up, and
    `watched` says whether the objects of a weight are compared before each call."""
    value_at = cache(value_at)
    registry = recorded_outputs()

    def is_needless(entry: Any) -> bool:
        place = source_text(entry.orig_guard)
        weight, wrapping, _ = place.partition(_INNER_NAMES)
        if wrapping or entry.guard_type == _WRAPPING:
            return watched(value_at(weight))
        source = entry.orig_guard.originating_source
        if "_hooks" in place and _is_of_hooks(source, value_at):
            return True
        return "G[" in place and registry is not None and _lies_in(source, registry, value_at)

    return [not is_needless(entry) for entry in entries]


def _is_of_hooks(source: Any, value_at: Callable[[str], Any]) -> bool:
    """Whether the place is a table of hooks of a module, or of a mark in it."""
    below = None
    for name in _names_up(source):
        if _TABLE.fullmatch(name):
            hook = None if below is None else value_at(below)
            return not callable(hook) or isinstance(hook, MARKS)
        below = name
    return False


def _lies_in(source: Any, container: Any, value_at: Callable[[str], Any]) -> bool:
    globals_only = (name for name in _names_up(source) if name.startswith("G["))
    return any(value_at(name) is container for name in globals_only)


def _names_up(source: Any) -> Iterator[str]:
    """The name of a place, and of each place that it was reached from."""
    while source is not None:
        yield source_text(source)
        source = getattr(source, "base", None)
