"""The tensors of a model, by the modules that hold them, and what names of a checkpoint lead to."""

from __future__ import annotations

from torch import nn

from lorafx.errors import LorafxError
from lorafx.loading.weight_places import Target
from lorafx.model.module_graph import ModuleGraph, join
from lorafx.model.saved_names import SavedNames


class WeightNames(SavedNames):
    """Walks names of tensors through one model.

    Attributes:
        graph: the model's.
        required, optional: what `state_dict()` may have: parameters and persistent buffers, each
            by its first name.
    """

    def __init__(self, graph: ModuleGraph, model: nn.Module) -> None:
        super().__init__(model)
        self.graph = graph
        self._targets: dict[tuple[int, str], Target] = {}
        self.required: list[Target] = []
        self.optional: list[Target] = []
        for path, module in model.named_modules():
            for kind, found in (
                (module._parameters, self.required),
                (module._buffers, self.optional),
            ):
                for name, tensor in kind.items():
                    if tensor is not None:
                        target = Target(module, name, join(path, name))
                        self._targets[id(module), name] = target
                        found.append(target)

    def target(self, module: nn.Module, attribute: str) -> Target | None:
        """The tensor that `module` holds by this name, None where it holds none."""
        return self._targets.get((id(module), attribute))

    def ways(self, target: Target) -> int:
        """How many paths lead to a target's module; 2 where there are more."""
        try:
            return len(self.graph.paths(target.module, limit=2))
        except LorafxError:  # put there since the model was compiled
            return 1
