"""Dynamo's guards that lorafx drops, in frames that always belong to the same model.

Dynamo guards some thirty things of each mark, and a dozen of each hook's module: 3.5 µs per call
and site. Dropped are guards on marks, which never change; on torch.nn's notes of a marked module's
hooks (other hooks are seen by lorafx.model.changes_watch); and on transformers' notes of model
classes. Frames shared by several layers keep every guard.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from lorafx.model.marks import MARKS
from lorafx.torch_internals.compat import recorded_outputs
from lorafx.torch_internals.frames import absent_attribute, source_text

_HOOKS = "._forward_hooks"
#: torch.nn's notes of hooks by numbers that are never reused.
_ALWAYS, _ALWAYS_GLOBAL = "._forward_hooks_always_called", "._global_forward_hooks_always_called"
_WITH_KWARGS = "._forward_hooks_with_kwargs"
#: Hook dictionaries that Dynamo, since torch 2.14, guards to be empty on hooked modules.
_OTHER_HOOKS = ("_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
#: Attributes that Dynamo looks up only on hooked modules.
_CALLS = ("__call__", "_call_impl", "_compiled_call_impl")


def keep_guards(entries: Sequence[Any], at: Callable[[str], Any]) -> list[bool]:
    """Which of Dynamo's `GuardFilterEntry`s of an entry's frame to keep; `at` gives the object at
    one of Dynamo's places."""
    guards = [entry.orig_guard for entry in entries]
    places = list(map(source_text, guards))
    hooks = list(map(_hook_above, guards, places))
    marks = {name for name in set(hooks) if name and isinstance(at(name), MARKS)}
    of_hooks = _places_of_hooks(places, at)
    of_registry = _registry_places(at)
    return [
        not (
            hook in marks
            or place in of_hooks
            or (place + _HOOKS in of_hooks and absent_attribute(guard) in _CALLS)
            or (bool(of_hooks) and place.endswith(_ALWAYS_GLOBAL))
            or ("G[" in place and of_registry(guard.originating_source))
        )
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


def _places_of_hooks(places: Sequence[str], at: Callable[[str], Any]) -> set[str]:
    """What torch.nn notes of the hooks of modules that have marks and no other hooks."""
    found: set[str] = set()
    for place in dict.fromkeys(places):
        name = place.removesuffix(_HOOKS)
        module = at(name) if name != place else None
        if isinstance(module, nn.Module) and _only_marks(module._forward_hooks):
            known = f"{name}{_WITH_KWARGS}"
            found |= {place, name + _ALWAYS, known, f"{known}[list(dict.keys({known}))[0]]"}
            found |= {f"{name}.{kind}" for kind in _OTHER_HOOKS if not getattr(module, kind)}
    return found


def _only_marks(hooks: Any) -> bool:
    return bool(hooks) and all(isinstance(hook, MARKS) for hook in hooks.values())


def _hook_above(guard: Any, place: str) -> str | None:
    """The place of the hook below `self` that contains the guard's subject."""
    source: Any = guard.originating_source if _HOOKS in place else None
    while (base := getattr(source, "base", None)) is not None:
        if source_text(base).endswith(_HOOKS):
            name = source_text(source)
            return name if name.startswith("L['self']") else None
        source = base
    return None
