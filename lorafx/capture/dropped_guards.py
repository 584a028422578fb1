"""Dynamo's guards on marks in frames of an entry's own code.

Dynamo guards everything that it read from a mark: some thirty guards per site, 3.5 µs per call and
site (42 sites: 157 → 303 µs per step). A mark never changes once it is attached, and in a frame of
the compiled module itself it is always the same mark, so one guard is kept of all of them: whether
any adapter is active (one for each model, where several share modules). Of what torch.nn notes of
hooks beside them nothing is guarded there either: 80 sites 48 → 30 µs per call. Frames that several
layers may share (parts of a model that breaks into several graphs) keep every guard: there the
marks tell the layers apart.

They are dropped before Dynamo makes them, which takes as long as a quarter of its tracing.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import nn
from torch._dynamo.guards import GuardBuilder

from lorafx.captured_frame import frame_guards, keep_frame_guards, named_by_dynamo, source_text
from lorafx.compat import recorded_outputs
from lorafx.model.marks import SiteMark
from lorafx.model.row_marks import RowMark

_HOOKS = "._forward_hooks"
#: What torch.nn notes of hooks by their numbers, which are never given twice.
_ALWAYS, _ALWAYS_GLOBAL = "._forward_hooks_always_called", "._global_forward_hooks_always_called"
_WITH_KWARGS = "._forward_hooks_with_kwargs"
#: Kinds of hooks of which Dynamo guards, since torch 2.14, that a module with another has none.
_OTHER_HOOKS = ("_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
#: What Dynamo looks for in the dictionary of a module only where the module has hooks.
_CALLS = ("__call__", "_call_impl", "_compiled_call_impl")
ACTIVE = ".runtime.active"


def drop_guards_on_marks() -> None:
    """For a frame that is the same model's in every call."""
    guards = frame_guards()
    below, marks = marks_of_self(guards)
    kept: dict[int, Any] = {}
    for guard, name in zip(guards, below, strict=True):
        if name in marks and source_text(guard).endswith(ACTIVE):
            kept.setdefault(id(marks[name].runtime), guard)
    # Without the guards that tell the two roads apart nothing may be dropped.
    if kept.keys() == {id(mark.runtime) for mark in marks.values()}:
        chosen = {id(guard) for guard in kept.values()}
        pairs = zip(guards, below, strict=True)
        keep_frame_guards([g for g, name in pairs if name not in marks or id(g) in chosen])


def drop_guards_on_classes() -> None:
    """For any frame of a model. transformers notes once, of each class whose first model is made,
    what the class says its outputs can record. Dynamo guards all of these notes, so that a model of
    another class would have every graph captured again."""
    if (registry := recorded_outputs()) is None:
        return
    known: dict[str, bool] = {}

    def of_registry(source: Any) -> bool:
        if "G[" not in source_text(source):  # of nothing global, as most are
            return False
        while source is not None:
            name = source_text(source)
            if name.startswith("G[") and name not in known:
                known[name] = named_by_dynamo(name) is registry
            if known.get(name, False):
                return True
            source = getattr(source, "base", None)
        return False

    guards = frame_guards()
    kept = [guard for guard in guards if not of_registry(guard.originating_source)]
    if len(kept) < len(guards):
        keep_frame_guards(kept)


def drop_guards_on_marked_modules() -> list[nn.Module]:
    """For any frame in whose calls somebody looks for hooks of others (lorafx.model.hook_watch). Of
    a module with a hook Dynamo guards a dozen things that it does not ask of one without, and none
    of them is needed:

    - a mark takes keyword arguments, and is not always called: it is the only hook with its number;
    - it has no hooks of other kinds; the watch sees those that come around its forward;
    - the module has no `__call__`, `_call_impl` or `_compiled_call_impl` of its own. Where it has
      no hook, nobody asks;
    - where the mark is gone, `match` finds the weight without it, and the graph is the same.

    Returns:
        The modules.
    """
    guards = frame_guards()
    names = [source_text(guard) for guard in guards]
    of_hooks = [name for name in dict.fromkeys(names) if name.endswith(_HOOKS)]
    marked = {
        name.removesuffix(_HOOKS): module
        for name in of_hooks
        if isinstance(module := named_by_dynamo(name.removesuffix(_HOOKS)), nn.Module)
        and _only_marks(module._forward_hooks)
    }
    if not marked:
        return []
    noted = [_WITH_KWARGS, _ALWAYS, _HOOKS]
    constant = {module + name for module in marked for name in noted}
    for module, found in marked.items():
        constant |= {f"{module}.{name}" for name in _OTHER_HOOKS if not getattr(found, name)}
        with_kwargs = module + _WITH_KWARGS
        constant.add(f"{with_kwargs}[list(dict.keys({with_kwargs}))[0]]")

    def needed(guard: Any, name: str) -> bool:
        if name in constant or name.endswith(_ALWAYS_GLOBAL):
            return False
        return name not in marked or _attribute(guard) not in _CALLS

    keep_frame_guards([g for g, name in zip(guards, names, strict=True) if needed(g, name)])
    return list(marked.values())


def _only_marks(hooks: Any) -> bool:
    return bool(hooks) and all(isinstance(hook, (SiteMark, RowMark)) for hook in hooks.values())


def _attribute(guard: Any) -> str | None:
    """The attribute that this guard says is not in the module's dictionary."""
    made = guard.create_fn
    absent = isinstance(made, partial) and made.func is GuardBuilder.NOT_PRESENT_IN_GENERIC_DICT
    return made.keywords.get("attr") if absent else None


def marks_of_self(guards: Sequence[Any]) -> tuple[list[str | None], dict[str, SiteMark | RowMark]]:
    """For each guard where Dynamo found the mark that it is about, or about something in it; and
    the marks by those names."""
    seen: dict[str, Any] = {}
    below = [_hook_above(guard, seen) for guard in guards]
    marks = {name: hook for name, hook in seen.items() if isinstance(hook, (SiteMark, RowMark))}
    return [name if name in marks else None for name in below], marks


def _hook_above(guard: Any, seen: dict[str, Any]) -> str | None:
    """Where the hook below `self` is that this guard is about; it is noted in `seen`."""
    source = guard.originating_source
    if _HOOKS not in source_text(source):  # most are about something else
        return None
    while (base := getattr(source, "base", None)) is not None:
        if source_text(base).endswith(_HOOKS):
            name = source_text(source)
            if name.startswith("L['self']") and name not in seen:
                seen[name] = named_by_dynamo(name)
            return name
        source = base
    return None
