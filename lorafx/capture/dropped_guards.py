"""Dynamo's guards on marks in frames of an entry's own code.

Dynamo guards everything that it read from a mark: some thirty guards per site, 3.5 µs per call and
site (42 sites: 157 → 303 µs per step). A mark never changes once it is attached, and in a frame of
the compiled module itself it is always the same mark, so one guard is kept of all of them: whether
any adapter is active (one for each model, where several share modules). That the hook is still
there, and alone, is guarded on the hooks' dictionary of its module and stays. Frames that several
layers may share (parts of a model that breaks into several graphs) keep every guard: there the
marks tell the layers apart.

They are dropped before Dynamo makes them, which takes as long as a quarter of its tracing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lorafx.captured_frame import frame_guards, keep_frame_guards, named_by_dynamo, source_text
from lorafx.compat import recorded_outputs
from lorafx.model.marks import SiteMark
from lorafx.model.row_marks import RowMark

_HOOKS = "._forward_hooks"
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
    while (base := getattr(source, "base", None)) is not None:
        if source_text(base).endswith(_HOOKS):
            name = source_text(source)
            if name.startswith("L['self']") and name not in seen:
                seen[name] = named_by_dynamo(name)
            return name
        source = base
    return None
