"""Which of Dynamo's guards are worth checking before each call, where a graph is saved.

Those on marks are not, as in `lorafx.capture.dropped_guards`; but all of them are made and noted,
and another process verifies them before it takes the graph.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from torch._guards import Source

from lorafx.model.marks import SiteMark
from lorafx.model.row_marks import RowMark


def keep_guards(module: nn.Module, guards: Sequence[Any]) -> list[bool]:
    """For each of a new graph's guards whether to keep it; `module` is the compiled one."""
    if not any(_is_self(guard, module) for guard in guards):
        return [True] * len(guards)
    sources = [guard.orig_guard.originating_source for guard in guards]
    marks = {
        source: id(guard.value.runtime)
        for guard, source in zip(guards, sources, strict=True)
        if isinstance(guard.value, (SiteMark, RowMark))
    }
    if not marks:
        return [True] * len(guards)
    kept: list[bool] = []
    runtimes: set[int] = set()  # several where models share modules
    for guard, source in zip(guards, sources, strict=True):
        runtime = _runtime_above(source, marks)
        of_mark = runtime is not None
        active = (
            runtime is not None
            and runtime not in runtimes
            and guard.name.endswith(".runtime.active")
        )
        if active and runtime is not None:
            runtimes.add(runtime)
        kept.append(active or not of_mark)
    # Without the guards that tell the two roads apart nothing may be dropped.
    return kept if runtimes == set(marks.values()) else [True] * len(guards)


def _runtime_above(source: Any, marks: Mapping[Source, int]) -> int | None:
    """The runtime of the mark that `source` leads to or through."""
    while source is not None:
        if source in marks:
            return marks[source]
        source = getattr(source, "base", None)
    return None


def _is_self(guard: Any, module: nn.Module) -> bool:
    return guard.value is module and guard.name in ("self", "L['self']")
