"""One source of checkpoint tensors on its way into the weights of a model.

    source ─▶ names ─▶ meanings ─▶ plan (shapes, dtypes, duplicates, what is missing) ─▶ writes

All of it is planned before the first write.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from lorafx.errors import CheckpointError
from lorafx.model.module_graph import ModuleGraph, storage_key
from lorafx.weights.loadable_layer import methods_of
from lorafx.weights.resolve import Resolver
from lorafx.weights.sources import Weights, WeightSource, source_of
from lorafx.weights.update_plan import UpdatePlan
from lorafx.weights.weight_places import (
    Destination,
    GroupMember,
    Meaning,
    TensorGroup,
    memory_key,
)

if TYPE_CHECKING:
    from lorafx.weights.copies import Copies


class Loading:
    """One source, its plan, which `check` makes, and its writes."""

    def __init__(
        self,
        resolver: Resolver,
        source: WeightSource,
        *,
        strict: bool,
        live: bool = True,
        copies: Copies | None = None,
    ) -> None:
        """`copies`: tensors of the model that repeat weights."""
        self.plan = UpdatePlan(resolver, strict=strict, stable=source.stable, live=live)
        self._source = source
        self._copies = copies
        self._storages = {storage_key(target.tensor) for target in self.plan.targets}
        #: Tensors of groups that are not whole yet.
        self._held: dict[TensorGroup, dict[str, Tensor]] = {}

    def check(self) -> None:
        """Plan all of it; BaseWeightsError for all that is wrong."""
        for name, tensor in self._source.pairs():
            meaning = self.plan.take(name, tensor)
            if meaning is not None and self._is_own(meaning, tensor):
                self.plan.problems.append(
                    f"{name}: it shares memory with the weights of this model; pass a copy"
                )
        if self._copies is None:
            self.plan.finish()
            return
        self.plan.problems.extend(self._copies.refusals(self.plan.filled()))
        self.plan.finish(self._copies.holds)

    def write(self) -> None:
        """Write all of it. CheckpointError where the second reading differs from the first."""
        planned = dict(self.plan.planned)
        for name, tensor in self._source.pairs():
            meaning = self.plan.meanings.get(name)
            if meaning is None:
                continue
            if planned.pop(name, None) != (tuple(tensor.shape), tensor.dtype):
                raise CheckpointError(f"{name}: it came as a different tensor the second time")
            self._put(meaning, tensor)
        if planned:
            raise CheckpointError(f"{next(iter(planned))} did not come a second time")

    def _is_own(self, meaning: Meaning, tensor: Tensor) -> bool:
        """Whether a tensor lies in the model's own weights, elsewhere than where it goes."""
        if storage_key(tensor) not in self._storages:
            return False
        places = () if isinstance(meaning, GroupMember) else meaning.places
        return not (places and places[0].is_at(tensor))

    def _put(self, meaning: Meaning, loaded: Tensor) -> None:
        if isinstance(meaning, Destination):
            meaning.write(loaded)
            return
        group = meaning.group
        held = self._held.setdefault(group, {})
        held[meaning.name] = loaded if self._source.stable else loaded.clone()
        if len(held) == len(group.names):
            made = group.joined(self._held.pop(group))
            for found, tensor in zip(group.destinations, made, strict=True):
                found.write(tensor)


def load_weights(
    model: nn.Module,
    weights: Weights,
    strict: bool = True,
) -> set[str]:
    """Load checkpoint tensors into the parameters and persistent buffers of `model`.

    Args:
        weights: (name, tensor) pairs, a mapping, a safetensors file or folder, or a function that
            yields pairs, under any of the names that updates take (docs/base_weights.md). All of it
            is checked before anything is written; what can be read only once is copied first.
        strict: tensors that the model has no place for, and parts of it that got no tensor, are
            errors too.

    Returns names of the parameters and buffers that were loaded, wholly or in part; for tied ones
    all names.

    Raises:
        CheckpointError: all unknown, missing, duplicate and misshapen names, in one; or no
            safetensors.
        ConfigError: a malformed `packed_modules_mapping`.
    """
    resolver = Resolver(ModuleGraph(model), model, None)
    loading = Loading(resolver, source_of(weights), strict=strict, live=False)
    loading.check()
    loading.write()
    filled = loading.plan.filled()
    for module, method in methods_of(filled):
        method.process_weights_after_loading(module)
    keys = {target.key for target in filled}
    state = model.state_dict(keep_vars=True)
    return {n for n, t in state.items() if isinstance(t, Tensor) and memory_key(t) in keys}
