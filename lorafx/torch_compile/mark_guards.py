"""Dynamo's guards on marks in frames of an attached model's own forward.

Dynamo guards everything that it read from a mark, some thirty guards per site and call
(`lorafx.serving.guards`). Here any model of the class runs the same code, so what says whose marks
they are has to stay: all guards on the first mark, which name its runtime, and with it whether an
adapter is active. The other marks below the same `self` are those of the same model, as long as its
modules are where they were. Graphs of calls with adapters compare the weights of each call for
that (`lorafx.capture.bound_inputs`), and guards on marks whose bank is still loaded stay. That a
hook is still there, and alone, is guarded on the hooks' dictionary of its module.
"""

from __future__ import annotations

from typing import Any

from lorafx.capture.bound_inputs import BoundInputs
from lorafx.compat import frame_guards, keep_frame_guards, named_by_dynamo, source_text
from lorafx.model.marks import SiteMark
from lorafx.model.row_marks import RowMark
from lorafx.program.program import Program

_HOOKS, _ACTIVE, _KEY = "._forward_hooks", ".runtime.active", ".runtime._key"


def drop_guards_on_marks(program: Program, bound: BoundInputs | None) -> None:
    """For a frame whose `self` is the model. `bound`: the inputs that its graph does not load, in
    a call with adapters."""
    guards = frame_guards()
    marks: dict[str, Any] = {}  # by where Dynamo found them
    below = [_mark_above(guard, marks) for guard in guards]
    own = {name: mark for name, mark in marks.items() if _is_of(mark, program)}
    named = {source_text(guard) for guard in guards}
    # Dynamo guards what it reads once of objects that many places hold, such as the runtime.
    said = [name for name in own if name + (_KEY if program.runtime.active else _ACTIVE) in named]
    if not said:
        return
    banks = set() if bound is None else {id(group.bank) for group, _ in bound.banks}
    dropped = {
        name
        for name, mark in own.items()
        if not program.runtime.active or isinstance(mark, RowMark) or id(mark.bank) in banks
    } - {said[0]}
    keep_frame_guards(
        [guard for guard, name in zip(guards, below, strict=True) if name not in dropped]
    )


def _is_of(mark: Any, program: Program) -> bool:
    return isinstance(mark, (SiteMark, RowMark)) and mark.runtime is program.runtime


def _mark_above(guard: Any, marks: dict[str, Any]) -> str | None:
    """Where the mark is that this guard is about, or something in it; noted in `marks`."""
    source = guard.originating_source
    while (base := getattr(source, "base", None)) is not None:
        if source_text(base).endswith(_HOOKS):
            name = source_text(source)
            if name.startswith("L['self']") and name not in marks:
                marks[name] = named_by_dynamo(name)
            return name
        source = base
    return None
