"""What attaching has added to a model, and how it is removed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

import lorafx.kernels.ops.conv_ops
import lorafx.kernels.ops.linear_ops
import lorafx.kernels.ops.row_ops  # noqa: F401  (all define torch.ops.lorafx)
from lorafx.interrupts import Rollback
from lorafx.model.marks import MARKS, RowHook, SiteMark
from lorafx.model.module_graph import ModuleGraph
from lorafx.model.runtime import Runtime
from lorafx.model.sites import Group
from lorafx.placements import callers


@dataclass(eq=False)
class Attachment:
    """What `attach` added to a model; `rollback` removes it, and undoes the changes before it."""

    groups: tuple[Group, ...]
    runtime: Runtime
    marks: dict[str, SiteMark]
    rollback: Rollback

    def detach(self) -> None:
        """Remove the marks; safe to call twice."""
        self.rollback.run()


def marks_on(module: nn.Module) -> list[SiteMark | RowHook]:
    """The marks around a module's computation."""
    hooks = [hook for caller in callers(module) for hook in caller._forward_hooks.values()]
    return [hook for hook in hooks if isinstance(hook, MARKS)]


def sessions_of_marks(graph: ModuleGraph) -> list[Any]:
    sessions = {
        id(hook.runtime.session): hook.runtime.session
        for _, module in graph.modules()
        for hook in marks_on(module)
        if hook.runtime.session is not None
    }
    return list(sessions.values())


def detach(model: nn.Module) -> int:
    """Remove every mark from `model`, also from a deep copy or unpickled model, except those of
    another served model that shares modules with it. Returns how many were removed."""
    removed = 0
    modules = [caller for _, module in ModuleGraph(model).modules() for caller in callers(module)]
    for module in modules:
        for key, hook in list(module._forward_hooks.items()):
            if not isinstance(hook, MARKS):
                continue
            session = hook.runtime.session
            if session is None or session.program.model is model:
                del module._forward_hooks[key]
                module._forward_hooks_with_kwargs.pop(key, None)
                module._forward_hooks_always_called.pop(key, None)
                removed += 1
    return removed
