"""Dynamo's guards that lorafx drops, in frames that always belong to the same model.

Dynamo guards some thirty things of each mark, which never changes: a tenth of a small model's step.
Guards on transformers' notes of model classes would capture graphs again whenever a model of
another class is made. Frames shared by several layers keep every guard.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

from lorafx.model.marks import MARKS
from lorafx.torch_internals.compat import recorded_outputs
from lorafx.torch_internals.frames import source_text

_HOOKS = "._forward_hooks"


def keep_guards(entries: Sequence[Any], at: Callable[[str], Any]) -> list[bool]:
    """Which of Dynamo's `GuardFilterEntry`s of an entry's frame to keep; `at` gives the object at
    one of Dynamo's places."""
    guards = [entry.orig_guard for entry in entries]
    places = list(map(source_text, guards))
    hooks = list(map(_hook_above, guards, places))
    marks = {name for name in set(hooks) if name and isinstance(at(name), MARKS)}
    of_registry = _registry_places(at)
    return [
        not (hook in marks or ("G[" in place and of_registry(guard.originating_source)))
        for guard, place, hook in zip(guards, places, hooks, strict=True)
    ]


def _registry_places(at: Callable[[str], Any]) -> Callable[[Any], bool]:
    """What says whether a source is part of transformers' notes of model classes."""
    registry = recorded_outputs()

    @functools.cache
    def is_registry(name: str) -> bool:
        return registry is not None and at(name) is registry

    def of_registry(source: Any) -> bool:
        while source is not None:
            name = source_text(source)
            if name.startswith("G[") and is_registry(name):
                return True
            source = getattr(source, "base", None)
        return False

    return of_registry


def _hook_above(guard: Any, place: str) -> str | None:
    """The place of the hook below `self` that contains the guard's subject."""
    source: Any = guard.originating_source if _HOOKS in place else None
    while (base := getattr(source, "base", None)) is not None:
        if source_text(base).endswith(_HOOKS):
            name = source_text(source)
            return name if name.startswith("L['self']") else None
        source = base
    return None
