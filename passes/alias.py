"""alias: every instance once, under its canonical path, with the other paths that reach it.

    model → ModuleGraph

Two names for one instance are one node, so that it gets one mark; two parameters over one
storage (a tied head and embedding) stay two sites over one storage node. `torch.compile`'s
wrapper is refused here: it hides the model one level down, and its graphs would never see marks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from lorafx.errors import CaptureError, some
from lorafx.model.module_graph import ModuleGraph, join
from lorafx.program.preparation import Preparation
from lorafx.torch_internals.modules import OptimizedModule


@dataclass(frozen=True)
class Alias:
    """Each module once, under its canonical path, with the other paths that reach it.

    Raises CaptureError, naming the path, when the model holds a `torch.compile` wrapper.
    """

    name: ClassVar[str] = "alias"

    def run(self, model: Preparation) -> int:
        graph = model.graph = ModuleGraph(model.model)
        for path, module in graph.modules():
            if isinstance(module, OptimizedModule):
                where = f"the module at {path!r}" if path else "the model"
                raise CaptureError(
                    f"{where} is wrapped by torch.compile; pass the module itself "
                    "(`._orig_mod` of the wrapper), which lorafx compiles"
                )
            aliases = graph.paths(module)[1:]
            if aliases:
                model.notes.append(f"{path} is also {some(aliases)}: one module, with one delta")
        for owners in graph.tied():
            held = some([join(owner.path, owner.attribute) for owner in owners])
            model.notes.append(f"{held} are one weight")
        return len(list(graph.modules()))
