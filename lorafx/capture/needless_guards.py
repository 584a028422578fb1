"""Dynamo's guards that lorafx drops, in frames that always belong to the same model.

Dynamo guards some thirty things of each mark, and a dozen of each hook's module: 3.5 µs per call
and site. Dropped are guards on marks, which never change; on torch.nn's notes of a marked module's
hooks (other hooks are seen by lorafx.model.changes_watch); and on transformers' notes of model
classes. Frames shared by several layers keep every guard.

They are dropped by the public `guard_filter_fn`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from lorafx.model.marks import RowMark, SiteMark
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


class FrameGuards:
    """The guards of a frame, all kept until dropped: Dynamo's `places` of their subjects, `marks`
    below `self` by place, and the mark that contains each subject (`below`)."""

    def __init__(self, guards: Sequence[Any], at: Callable[[str], Any]) -> None:
        self.guards, self._at = guards, at
        self.places = [source_text(guard) for guard in guards]
        self._dropped: set[int] = set()
        hooks = [
            _hook_above(*pair) if _HOOKS in pair[1] else None
            for pair in zip(guards, self.places, strict=True)
        ]
        found = {name: at(name) for name in dict.fromkeys(hooks) if name}
        self.marks = {n: v for n, v in found.items() if isinstance(v, (SiteMark, RowMark))}
        self.below = [name if name in self.marks else None for name in hooks]

    @property
    def kept(self) -> list[bool]:
        return [number not in self._dropped for number in range(len(self.guards))]

    def drop_marks(self, names: set[str]) -> None:
        self._dropped |= {number for number, name in enumerate(self.below) if name in names}

    def drop_classes(self) -> None:
        """Drop guards on transformers' notes of model classes."""
        if (registry := recorded_outputs()) is None:
            return
        known: dict[str, bool] = {}

        def of_registry(source: Any) -> bool:
            while source is not None:
                name = source_text(source)
                if name.startswith("G[") and name not in known:
                    known[name] = self._at(name) is registry
                if known.get(name, False):
                    return True
                source = getattr(source, "base", None)
            return False

        for number, (guard, place) in enumerate(zip(self.guards, self.places, strict=True)):
            if "G[" in place and of_registry(guard.originating_source):
                self._dropped.add(number)

    def drop_hooks_of_marked(self) -> None:
        """Drop guards on the hooks of modules that have marks and no other hooks."""
        marked: dict[str, nn.Module] = {}
        for place in dict.fromkeys(self.places):
            module = self._at(place.removesuffix(_HOOKS)) if place.endswith(_HOOKS) else None
            if isinstance(module, nn.Module) and _only_marks(module._forward_hooks):
                marked[place.removesuffix(_HOOKS)] = module
        constant: set[str] = set()
        for name, module in marked.items():
            known = f"{name}{_WITH_KWARGS}"
            constant |= {
                name + _ALWAYS,
                name + _HOOKS,
                known,
                f"{known}[list(dict.keys({known}))[0]]",
            }
            constant |= {f"{name}.{kind}" for kind in _OTHER_HOOKS if not getattr(module, kind)}
        for number, (guard, place) in enumerate(zip(self.guards, self.places, strict=True)):
            of_hooks = place in constant or (bool(marked) and place.endswith(_ALWAYS_GLOBAL))
            if of_hooks or (place in marked and absent_attribute(guard) in _CALLS):
                self._dropped.add(number)


def keep_guards(entries: Sequence[Any], at: Callable[[str], Any]) -> list[bool]:
    """Which of Dynamo's `GuardFilterEntry`s of an entry's frame to keep; `at` as in FrameGuards."""
    found = FrameGuards([entry.orig_guard for entry in entries], at)
    found.drop_marks(set(found.marks))
    found.drop_classes()
    found.drop_hooks_of_marked()
    return found.kept


def _only_marks(hooks: Any) -> bool:
    return bool(hooks) and all(isinstance(hook, (SiteMark, RowMark)) for hook in hooks.values())


def _hook_above(guard: Any, place: str) -> str | None:
    """The place of the hook below `self` that contains the guard's subject."""
    source = guard.originating_source
    while (base := getattr(source, "base", None)) is not None:
        if source_text(base).endswith(_HOOKS):
            name = source_text(source)
            return name if name.startswith("L['self']") else None
        source = base
    return None
