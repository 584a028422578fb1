"""The hooks that lorafx puts on a model's modules, and their removal."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from lorafx.interrupts import Rollback
from lorafx.model.marks import SiteMark
from lorafx.model.module_graph import ModuleGraph
from lorafx.model.row_marks import RowMark
from lorafx.model.runtime import Runtime
from lorafx.model.sites import Group

#: Hooks that are lorafx's.
MARKS = (SiteMark, RowMark)


@dataclass(eq=False)
class Attachment:
    """What `attach` put on a model.

    Attributes:
        groups: siblings and their banks, in the order of their first sites.
        runtime: the batch that all marks read.
        marks: the mark of each site, by canonical path.
        rollback: takes the marks away, and undoes what was done to the model before they came.
    """

    groups: tuple[Group, ...]
    runtime: Runtime
    marks: dict[str, SiteMark]
    rollback: Rollback

    def detach(self) -> None:
        """Take the marks away again; safe to call twice."""
        self.rollback.run()


def sessions_of_marks(graph: ModuleGraph) -> list[Any]:
    """The sessions whose marks hang on the modules of a model."""
    found = {
        id(hook.runtime.session): hook.runtime.session
        for _, module in graph.modules()
        for hook in module._forward_hooks.values()
        if isinstance(hook, MARKS) and hook.runtime.session is not None
    }
    return list(found.values())


def _of_another(hook: SiteMark | RowMark, model: nn.Module) -> bool:
    session = hook.runtime.session
    return session is not None and session.program.model is not model


def detach(model: nn.Module) -> int:
    """Take every mark off `model`, also those that a deep copy or pickle carried over, but none of
    another model that is served and shares modules with it.

    Returns:
        How many marks were removed.
    """
    removed = 0
    for _, module in ModuleGraph.of(model).modules():
        for key, hook in list(module._forward_hooks.items()):
            if isinstance(hook, MARKS) and not _of_another(hook, model):
                del module._forward_hooks[key]
                module._forward_hooks_with_kwargs.pop(key, None)
                module._forward_hooks_always_called.pop(key, None)
                removed += 1
    return removed
