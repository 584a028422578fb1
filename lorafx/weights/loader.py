"""One source of checkpoint tensors on its way into the weights of a model.

    source ─▶ names ─▶ meanings ─▶ plan (shapes, dtypes, duplicates, what is missing) ─▶ writes

A source that can be read twice is planned as a whole before the first write. For any other source
(a generator), each tensor is planned before it is written, and nothing is written after a problem.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from lorafx.errors import CheckpointError
from lorafx.interrupts import Rollback
from lorafx.model.module_graph import ModuleGraph, storage_key, writing
from lorafx.weights.groups import GroupMember, Meaning, TensorGroup, destinations_of
from lorafx.weights.loadable_layer import methods_of
from lorafx.weights.resolve import Resolver, StackedName, StackedResolver
from lorafx.weights.sources import Item, WeightSource, in_file, source_of
from lorafx.weights.update_plan import UpdatePlan
from lorafx.weights.weight_places import Destination, OwnLoader, Target, is_expanded, memory_key

Undo = Literal["memory", "disk"]


class UndoLog:
    """Old numbers of tensors, in host memory or, with "disk", in files of a temporary folder."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._saved: set[tuple[object, ...]] = set()
        self._rollback = Rollback()

    @classmethod
    @contextmanager
    def kept(cls, undo: Undo) -> Iterator[UndoLog]:
        if undo == "memory":
            yield cls(None)
            return
        with tempfile.TemporaryDirectory(prefix="lorafx-weights-") as folder:
            yield cls(Path(folder))

    def save(self, tensor: Tensor) -> None:
        key = memory_key(tensor)
        if key not in self._saved:
            self._rollback.add(partial(_write_back, tensor, self._copy(tensor.detach())))
            self._saved.add(key)

    def save_held(self, module: nn.Module) -> None:
        """Keep which tensors a module holds by itself, and their numbers."""
        places: tuple[dict[str, Any], ...] = (module._parameters, module._buffers, vars(module))
        for place in places:
            for name, tensor in place.items():
                if isinstance(tensor, Tensor):
                    self._rollback.add(partial(place.__setitem__, name, tensor))
                    if not tensor.is_meta and not is_expanded(tensor):
                        self.save(tensor)

    def restore(self) -> None:
        self._rollback.run()
        self._saved.clear()

    def _copy(self, tensor: Tensor) -> Tensor:
        if self._folder is None or not tensor.numel():
            return tensor.clone() if tensor.device.type == "cpu" else tensor.cpu()
        file = self._folder / str(len(self._saved))
        try:
            numbers = in_file(file, tensor)
        except OSError as error:
            raise CheckpointError(
                f"the old weights cannot be kept on disk until the update has ended: {error}. "
                "TMPDIR names a folder with room; undo='memory' keeps them in host memory"
            ) from error
        numbers.copy_(tensor)
        return numbers


def _write_back(tensor: Tensor, numbers: Tensor) -> None:
    with writing(tensor):
        tensor.detach().copy_(numbers)


class DerivedWeights:
    """Tensors that a model computes from its weights; none in this base class."""

    def holds(self, target: Target) -> bool:
        """Whether a target is computed from another."""
        return False

    def refusals(self, filled: Iterable[Target]) -> list[str]:
        """Why tensors computed from the weights that get new numbers cannot follow them."""
        return []


class Loading:
    """One source, its plan (complete after `check` or `write`), and its writes."""

    def __init__(
        self,
        resolver: Resolver,
        source: WeightSource,
        *,
        strict: bool,
        live: bool = True,
        derived: DerivedWeights | None = None,
    ) -> None:
        self.plan = UpdatePlan(resolver, strict=strict, stable=source.stable, live=live)
        self._source = source
        self._derived = derived or DerivedWeights()
        self._storages = {storage_key(target.tensor) for target in self.plan.targets}
        #: Copies of given tensors that lie in the model's own weights.
        self._copies: dict[str, Tensor] = {}
        self._undo_log: UndoLog | None = None
        #: Tensors of groups that are not whole yet.
        self._held: dict[TensorGroup, dict[str, Tensor]] = {}

    @property
    def fallible(self) -> bool:
        """Whether a loader of the model's own, which may raise, writes what is planned."""
        found = (d for meaning in self.plan.meanings.values() for d in destinations_of(meaning))
        return any(isinstance(cut.place, OwnLoader) for item in found for cut in item.cuts)

    def check(self) -> None:
        """Plan all of a source that can be read twice; BaseWeightsError for all that is wrong."""
        if not self._source.repeatable:
            return
        for item in self._source.items():
            meaning = self.plan.take(item)
            if meaning is not None and self._is_own(meaning, item):
                if self._source.stable:
                    self._copies[item.name] = item.read().clone()
                else:
                    self.plan.problems.append(_own_memory(item.name))
        self._finish()

    def write(self, undo_log: UndoLog | None = None) -> None:
        """Write all of it, planning where that was not done. Raises BaseWeightsError for all that
        is wrong with a source that is read once, CheckpointError where the second reading differs.
        """
        self._undo_log = undo_log
        if self._source.repeatable:
            self._write_planned()
        else:
            self._write_coming()

    def _write_planned(self) -> None:
        planned = dict(self.plan.planned)
        for item in self._source.items():
            meaning = self.plan.meanings.get(item.name)
            if meaning is None:
                continue
            if planned.pop(item.name, None) != (item.shape, item.numbers):
                raise CheckpointError(f"{item.name}: it came as a different tensor the second time")
            copy = self._copies.pop(item.name, None)
            self._put(meaning, item.read() if copy is None else copy)
        if planned:
            raise CheckpointError(f"{next(iter(planned))} did not come a second time")

    def _write_coming(self) -> None:
        for item in self._source.items():
            meaning = self.plan.take(item)
            if meaning is None:
                continue
            if self._is_own(meaning, item):
                self.plan.problems.append(_own_memory(item.name))
            elif not self.plan.problems:
                self._put(meaning, item.read())
        self._finish()

    def _finish(self) -> None:
        self.plan.problems.extend(self._derived.refusals(self.plan.filled()))
        self.plan.finish(self._derived.holds)

    def _is_own(self, meaning: Meaning, item: Item) -> bool:
        """Whether a tensor lies in the model's own weights, elsewhere than where it goes."""
        if item.given is None or storage_key(item.given) not in self._storages:
            return False
        cuts = () if isinstance(meaning, GroupMember) else meaning.cuts
        return not (cuts and cuts[0].place.is_at(item.given))

    def _put(self, meaning: Meaning, loaded: Tensor) -> None:
        if isinstance(meaning, Destination):
            self._write(meaning, loaded)
            return
        group = meaning.group
        held = self._held.setdefault(group, {})
        held[meaning.name] = loaded if self._source.stable else loaded.clone()
        if len(held) == len(group.names):
            made = group.joined(self._held.pop(group))
            for found, tensor in zip(group.destinations, made, strict=True):
                self._write(found, tensor)

    def _write(self, found: Destination, loaded: Tensor) -> None:
        if self._undo_log is not None:
            for cut in found.cuts:
                for target, _ in cut.place.fills(loaded.dtype):
                    self._undo_log.save(target.tensor)
        found.write(loaded)


def _own_memory(name: str) -> str:
    return f"{name}: it shares memory with the weights of this model; pass a copy"


def load_weights(
    model: nn.Module,
    weights: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]],
    stacked: Sequence[StackedName] | None = None,
    strict: bool = True,
) -> set[str]:
    """Load checkpoint tensors into the parameters and persistent buffers of `model`.

    Args:
        weights: (name, tensor) pairs, under any of the names that updates take
            (docs/base_weights.md). A mapping, or a list or tuple of pairs, is checked as a whole
            before anything is written; of another iterable each tensor is checked before it is
            written, and nothing is written after the first problem.
        stacked: (name in the model, name in the checkpoint, shard id), e.g.
            ("qkv_proj", "q_proj", "q"), ("in_proj_qkvz", "in_proj_qkv", (0, 1, 2)). It takes
            precedence over what the model and its modules declare in `packed_modules_mapping`.
        strict: tensors that the model has no place for, and parts of it that got no tensor, are
            errors too.

    Returns names of the parameters and buffers that were loaded, wholly or in part; for tied ones
    all names.

    Raises:
        CheckpointError: all unknown, missing, duplicate and misshapen names, in one.
        ConfigError: a malformed `packed_modules_mapping`.
    """
    resolver = StackedResolver(ModuleGraph(model), model, stacked or ())
    loading = Loading(resolver, source_of(weights), strict=strict, live=False)
    loading.check()
    loading.write()
    filled = loading.plan.filled()
    for module, method in methods_of(filled):
        method.process_weights_after_loading(module)
    keys = {target.key for target in filled}
    state = model.state_dict(keep_vars=True)
    return {n for n, t in state.items() if isinstance(t, Tensor) and memory_key(t) in keys}
