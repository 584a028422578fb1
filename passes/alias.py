"""Each module once, under its canonical path, with its other paths.

model → ModuleGraph
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from lorafx.errors import CaptureError, some
from lorafx.model.module_graph import ModuleGraph
from lorafx.placements import is_gathered
from lorafx.program.program import Preparation
from lorafx.torch_internals.dynamo import OptimizedModule
from lorafx.torch_internals.transformers_parts import is_offloaded


@dataclass(frozen=True)
class Alias:
    """Lists each module once, under its canonical path, with its other paths.

    Raises CaptureError for a `torch.compile` wrapper, whose graphs would never see marks, for
    FSDP2, and for weights that accelerate offloads.
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
            if is_gathered(module):
                raise CaptureError(
                    f"{path or 'the model'} is wrapped by fully_shard (FSDP2), which gathers its "
                    "weights around each call; give lorafx a model that is not, and push weights "
                    "into it by load_weights"
                )
            if is_offloaded(module):
                raise CaptureError(
                    f"the weights of {path or 'the model'} are offloaded by accelerate, which "
                    "brings them to the device around each call, where neither graphs nor deltas "
                    "follow them; load the model onto one device, without offloading, or in a "
                    "quantised format"
                )
            aliases = graph.paths(module)[1:]
            if aliases:
                model.notes.append(f"{path} is also {some(aliases)}: one module, with one delta")
        for holders in graph.tied():
            names = some([str(holder) for holder in holders])
            model.notes.append(f"{names} are one weight")
        return len(list(graph.modules()))
