"""load_weights: new base weights for a model that is serving.

    source ─▶ names ─▶ meanings ─▶ plan (shapes, dtypes, duplicates, what is missing) ─▶ writes

Numbers are written in place, so addresses stay: packed buffers, tied weights, captured graphs and
CUDA graphs see the new ones, and nothing is compiled again. What can be gone through twice is
checked before the first write, and costs no memory. What cannot (a generator) is written as it
comes; what the weights were is kept until all of it was right, and put back where it was not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from lorafx.base_weights.followers import DerivedCopies
from lorafx.base_weights.groups import GroupMember
from lorafx.base_weights.merge import unmerged
from lorafx.base_weights.resolve import Meaning, Resolver
from lorafx.base_weights.sources import Item, Source, Weights, source_of
from lorafx.base_weights.update_plan import UpdatePlan
from lorafx.base_weights.weight_places import Box, OwnLoader, same_memory
from lorafx.base_weights.writer import Journal, Undo, Writer
from lorafx.errors import CheckpointError, ConfigError
from lorafx.interrupts import undisturbed
from lorafx.model.module_graph import storage_key
from lorafx.model.packing import check_packed
from lorafx.session.sharing import refresh_elsewhere

if TYPE_CHECKING:
    from lorafx.session.session import Session

_BROKEN = (
    "an update of the base weights was interrupted while they were written, and they are partly "
    "old and partly new; call load_weights again with all of them"
)


@dataclass(frozen=True)
class WeightUpdate:
    """What an update did, by name.

    Attributes:
        loaded: parameters and buffers of the model that got numbers; of tied ones all names.
        missing: parameters that got none, or only some, and tensors that a joint place lacks.
        ignored: tensors that the model has no place for.
    """

    loaded: tuple[str, ...]
    missing: tuple[str, ...]
    ignored: tuple[str, ...]


def update_weights(
    session: Session, weights: Weights, *, strict: bool = True, undo: Undo = "memory"
) -> WeightUpdate:
    """New base weights for the model of a session; see `CompiledModel.load_weights`."""
    if undo not in ("memory", "disk"):
        raise ConfigError(f'undo is "memory" or "disk", got {undo!r}')
    source = source_of(weights)
    session.refuse_running("load_weights()")

    def update() -> WeightUpdate:
        return _update(session, source, strict=strict, undo=undo)

    report = unmerged(session, lambda: session.update(update))
    refresh_elsewhere(session)
    return report


def _update(session: Session, source: Source, *, strict: bool, undo: Undo) -> WeightUpdate:
    program = session.program
    program.look_at_modules()
    program.refuse_missing()
    check_packed(program.packed)
    resolver = Resolver(program.graph, program.model, program.config.packed_modules)
    plan = UpdatePlan(resolver, strict=strict, stable=source.stable)
    update = _Writing(session, resolver, plan)
    if source.repeatable:
        update.check(source)
    if source.repeatable and not update.fallible:
        update.write(source, None)
    else:
        with Journal.kept(undo) as journal:
            update.write(source, journal)
    return WeightUpdate(
        tuple(target.name for target in plan.filled()), tuple(plan.missing), tuple(plan.ignored)
    )


class _Writing:
    """One update: its plan, and what is known of the model before the first write."""

    def __init__(self, session: Session, resolver: Resolver, plan: UpdatePlan) -> None:
        self._session, self.plan = session, plan
        self._derived = DerivedCopies(session.program)
        targets = (*resolver.names.required, *resolver.names.optional)
        self._storages = {storage_key(target.tensor) for target in targets}
        #: Copies of tensors that were given and lie in the model's own weights.
        self._copies: dict[str, Tensor] = {}

    @property
    def fallible(self) -> bool:
        """Whether code of the model's takes part that may raise when tensors are written."""
        if self._derived.fallible(self.plan.filled()):
            return True
        landings = [
            landing
            for meaning in self.plan.meanings.values()
            for landing in (
                meaning.group.landings if isinstance(meaning, GroupMember) else (meaning,)
            )
        ]
        return any(isinstance(cut.place, OwnLoader) for found in landings for cut in found.cuts)

    def check(self, source: Source) -> None:
        """Plan all of it. Raises BaseWeightsError; nothing has changed then."""
        for item in source.items():
            meaning = self.plan.take(item)
            if meaning is not None and self._is_own(meaning, item):
                if source.stable:
                    self._copies[item.name] = item.read().clone()
                else:
                    self.plan.problems.append(_own_memory(item.name))
        self._finish()

    def write(self, source: Source, journal: Journal | None) -> None:
        """Write all of it, planning where that was not done.

        Raises:
            BaseWeightsError: what was written is put back.
            Whatever the source raises; without a journal the model is broken then.
        """
        session = self._session
        before, session.broken = session.broken, _BROKEN  # said before it is so
        try:
            if source.repeatable:
                self._write_planned(source, journal)
            else:
                self._write_coming(source, journal)
            self._derived.refresh(self.plan.filled(), journal)
            session.store.refresh_magnitudes()
            session.broken = before if self.plan.missing else ""
        except BaseException:
            if journal is None:
                # Copies stay those of the weights, so that the next update knows them.
                self._derived.recompute(self.plan.filled())
            else:
                undisturbed(lambda: self._put_back(journal, before))
            raise

    def _put_back(self, journal: Journal, broken: str) -> None:
        journal.restore()
        self._session.store.refresh_magnitudes()
        self._session.broken = broken

    def _write_planned(self, source: Source, journal: Journal | None) -> None:
        writer = Writer(journal, stable=source.stable)
        planned = dict(self.plan.planned)
        for item in source.items():
            meaning = self.plan.meanings.get(item.name)
            if meaning is None:
                continue
            if planned.pop(item.name, None) != (item.shape, item.numbers):
                raise CheckpointError(
                    f"{item.name}: the second time it came as another tensor than the first"
                )
            copy = self._copies.pop(item.name, None)
            writer.put(meaning, item.read() if copy is None else copy)
        if planned:
            raise CheckpointError(f"{next(iter(planned))} did not come a second time")

    def _write_coming(self, source: Source, journal: Journal | None) -> None:
        writer = Writer(journal, stable=False)
        for item in source.items():
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
        place = (
            meaning.cuts[0].place if not isinstance(meaning, GroupMember) and meaning.cuts else None
        )
        return not (isinstance(place, Box) and same_memory(place.view, item.given))


def _own_memory(name: str) -> str:
    return f"{name}: it lies in the weights of this very model; give a copy"
