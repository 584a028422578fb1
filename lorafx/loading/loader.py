"""One source of checkpoint tensors on its way into the weights of a model.

    source ─▶ names ─▶ meanings ─▶ plan (shapes, dtypes, duplicates, what is missing) ─▶ writes

A source that can be read twice is planned as a whole before the first write. For any other source
(a generator), each tensor is planned before it is written, and nothing is written after a problem.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from lorafx.errors import CheckpointError
from lorafx.loading.groups import GroupMember
from lorafx.loading.resolve import Meaning, Resolver
from lorafx.loading.sources import Item, WeightSource
from lorafx.loading.update_plan import UpdatePlan
from lorafx.loading.weight_places import OwnLoader, Target
from lorafx.loading.writer import UndoLog, Writer
from lorafx.model.module_graph import storage_key


class DerivedWeights:
    """What a model computes from its weights and has to follow them: nothing."""

    def holds(self, target: Target) -> bool:
        """Whether a target is computed from another."""
        return False

    def refusals(self, filled: Iterable[Target]) -> list[str]:
        """What cannot follow the weights that get new numbers."""
        return []


class Loading:
    """One source, its plan, and its writes.

    Attributes:
        source: what is loaded.
        plan: what its tensors mean: all of them after `check` where the source is repeatable, else
            after `write`.
    """

    def __init__(
        self,
        resolver: Resolver,
        source: WeightSource,
        *,
        strict: bool,
        live: bool = True,
        derived: DerivedWeights | None = None,
    ) -> None:
        """`strict`, `live`: see `UpdatePlan`."""
        self.source = source
        self.plan = UpdatePlan(resolver, strict=strict, stable=source.stable, live=live)
        self._derived = derived or DerivedWeights()
        targets = (*resolver.names.required, *resolver.names.optional)
        self._storages = {storage_key(target.tensor) for target in targets}
        #: Copies of tensors that were given and lie in the model's own weights.
        self._copies: dict[str, Tensor] = {}

    @property
    def fallible(self) -> bool:
        """Whether a loader of the model's own, which may raise, writes what is planned."""
        landings = [
            landing
            for meaning in self.plan.meanings.values()
            for landing in (
                meaning.group.landings if isinstance(meaning, GroupMember) else (meaning,)
            )
        ]
        return any(isinstance(cut.place, OwnLoader) for found in landings for cut in found.cuts)

    def check(self) -> None:
        """Plan all of what can be gone through twice.

        Raises:
            BaseWeightsError: for everything that is wrong, in one. Nothing has changed.
        """
        if not self.source.repeatable:
            return
        for item in self.source.items():
            meaning = self.plan.take(item)
            if meaning is not None and self._is_own(meaning, item):
                if self.source.stable:
                    self._copies[item.name] = item.read().clone()
                else:
                    self.plan.problems.append(_own_memory(item.name))
        self._finish()

    def write(self, undo_log: UndoLog | None = None) -> None:
        """Write all of it, planning where that was not done. `undo_log` keeps what it was.

        Raises:
            BaseWeightsError: for everything that is wrong with what comes once.
            CheckpointError: what comes twice came as something else.
            Whatever the source, or a parameter's own loader, raises.
        """
        writer = Writer(undo_log, stable=self.source.stable)
        if self.source.repeatable:
            self._write_planned(writer)
        else:
            self._write_coming(writer)

    def _write_planned(self, writer: Writer) -> None:
        planned = dict(self.plan.planned)
        for item in self.source.items():
            meaning = self.plan.meanings.get(item.name)
            if meaning is None:
                continue
            if planned.pop(item.name, None) != (item.shape, item.numbers):
                raise CheckpointError(f"{item.name}: it came as a different tensor the second time")
            copy = self._copies.pop(item.name, None)
            writer.put(meaning, item.read() if copy is None else copy)
        if planned:
            raise CheckpointError(f"{next(iter(planned))} did not come a second time")

    def _write_coming(self, writer: Writer) -> None:
        for item in self.source.items():
            meaning = self.plan.take(item)
            if meaning is None:
                continue
            if self._is_own(meaning, item):
                self.plan.problems.append(_own_memory(item.name))
            elif not self.plan.problems:
                writer.put(meaning, item.read())
        self._finish()

    def _finish(self) -> None:
        self.plan.problems.extend(self._derived.refusals(self.plan.filled()))
        self.plan.finish(self._derived.holds)

    def _is_own(self, meaning: Meaning, item: Item) -> bool:
        """Whether a tensor lies in the model's own weights, in another place than it goes to."""
        if item.given is None or storage_key(item.given) not in self._storages:
            return False
        cuts = () if isinstance(meaning, GroupMember) else meaning.cuts
        return not (cuts and cuts[0].place.is_at(item.given))


def _own_memory(name: str) -> str:
    return f"{name}: it shares memory with the weights of this model; pass a copy"
