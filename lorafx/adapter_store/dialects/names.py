"""Paths in a model of names that files have: with dots, or with underscores in their place."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property

from torch import nn

from lorafx.adapter_store.peft_keys import factor_sizes
from lorafx.adapter_store.places import Places
from lorafx.adapter_store.saved import AdapterState
from lorafx.errors import CheckpointError
from lorafx.model.module_graph import join
from lorafx.model.saved_names import without_compiled


class Names:
    """Paths of modules in a model, also with underscores in place of dots."""

    def __init__(self, model: nn.Module) -> None:
        self._model, self._places = model, Places((), model)

    def module(self, path: str) -> nn.Module | None:
        return self._places.module(path)

    def has(self, path: str) -> bool:
        return self.module(path) is not None

    def lost(self, state: AdapterState) -> list[str]:
        """The paths with factors that the model lacks."""
        return [path for path in factor_sizes(state.tensors) if not self.has(path)]

    def path(self, name: str, flat: bool) -> str:
        """The model's path for `name`, whose dots may be underscores. A `flat` name may begin with
        a wrapper that the model lacks (`text_model` of CLIP in transformers 5). Unknown names stay.
        CheckpointError for one that several modules have."""
        if not flat and self.has(name):
            return name
        underscored = name.replace(".", "_")
        for cut in range(3 if flat else 1):
            inner = underscored.split("_", cut)[-1]
            paths = self.flat.get(inner, [])
            if len(paths) > 1:
                raise CheckpointError(
                    f"{name} may be {' or '.join(paths)}, which are spelt alike without dots; save "
                    "the adapter in another dialect (diffusers, PEFT)"
                )
            for path in paths:
                return join(underscored.removesuffix(inner).removesuffix("_"), path)
        return name

    @cached_property
    def flat(self) -> Mapping[str, list[str]]:
        """Paths of modules with weights by their flattened forms."""
        paths: dict[str, list[str]] = {}
        for name, module in self._model.named_modules():
            if name and module._parameters:
                path = without_compiled(name)
                paths.setdefault(path.replace(".", "_"), []).append(path)
        return paths
