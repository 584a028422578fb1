"""Which of Dynamo's guards are worth checking before each call, where a graph is saved.

Those on marks are not, as in `lorafx.capture.dropped_guards`; but all of them are made and noted,
and another process verifies them before it takes the graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from lorafx.model.marks import SiteMark
from lorafx.model.row_marks import RowMark


def keep_guards(module: nn.Module, guards: Sequence[Any]) -> list[bool]:
    """For each of a new graph's guards whether to keep it; `module` is the compiled one."""
    if not any(_is_self(guard, module) for guard in guards):
        return [True] * len(guards)
    marks = {
        guard.name: id(guard.value.runtime)
        for guard in guards
        if isinstance(guard.value, (SiteMark, RowMark))
    }
    if not marks:
        return [True] * len(guards)
    kept: list[bool] = []
    runtimes: set[int] = set()  # several where models share modules
    for guard in guards:
        runtime = next((found for name, found in marks.items() if name in guard.name), None)
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


def _is_self(guard: Any, module: nn.Module) -> bool:
    return guard.value is module and guard.name in ("self", "L['self']")
