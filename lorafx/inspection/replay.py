"""A program's graphs captured once more, and run operator by operator as one of the passes left
them.

Which stage runs is chosen call by call; weights, banks and slots are the program's own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from lorafx.capture.backend import Backend
from lorafx.capture.lowering import Lowering, ReferenceLowering, lowering_for
from lorafx.capture.record import GraphRecord, Stage
from lorafx.pass_order import CAPTURED, pipeline
from lorafx.passes.outline.outline import Outline
from lorafx.passes.products import Join
from lorafx.passes.provenance import Provenance
from lorafx.runtime.entry import CompiledForwards, entered
from lorafx.runtime.session import Session

#: Runs a stage on its inputs.
Runner = Callable[[Stage, Sequence[Any]], Any]


class Replay:
    """The stages of all graphs of a program.

    Attributes:
        names: of the stages, in their order.
        current: which stage runs.
    """

    def __init__(self, session: Session) -> None:
        options = session.program.options
        self.names = (CAPTURED, *(item.name for item in pipeline(options).graph))
        self.current = self.names[-1]
        self._runner: Runner = lambda stage, given: stage.graph(*given)
        self.backend = Backend(session.program, entered)
        self.backend.lowering = _Replayed(lowering_for(options))
        self.backend.replay = self._running
        # It is not the first call of this program: what modules keep may be of a request.
        self.backend.records.extend(session.backend.records)

    @contextmanager
    def running(self, name: str, runner: Runner) -> Iterator[None]:
        """Inside, the stage of that name runs, by `runner`."""
        before = self.current, self._runner
        self.current, self._runner = name, runner
        try:
            yield
        finally:
            self.current, self._runner = before

    @property
    def apart(self) -> str:
        """The last stage in which a layer's operators stand in the graph itself, and a product and
        its delta are operators of their own."""
        for name in (Join.name, Outline.name):
            if name in self.names:
                return self.names[self.names.index(name) - 1]
        return self.names[-1]

    def _running(self, record: GraphRecord) -> Callable[[list[Any]], Any]:
        stages = {stage.name: stage for stage in record.stages}

        def run(arguments: list[Any]) -> Any:
            stage = stages[self.current]
            return self._runner(stage, arguments[: stage.input_count])

        return run


class _Replayed(ReferenceLowering):
    """Traces as the program's own lowering does; graphs of the base run node by node."""

    def __init__(self, own: Lowering) -> None:
        self._own = own

    def decompositions(self) -> dict[Any, Callable[..., Any]]:
        return self._own.decompositions()


@contextmanager
def replayed(entries: CompiledForwards) -> Iterator[Replay]:
    """Inside, calls of the model run the stage that is chosen. Its lock is held, and its graphs and
    options are put back."""
    session, program = entries.session, entries.session.program
    with session.lock:
        before = session.backend, entries.made, program.options
        replay = Replay(session)
        try:
            program.options = replace(program.options, verify="lint", cache=None, dump=None)
            session.backend, entries.made = replay.backend, {}
            yield replay
        finally:
            session.backend, entries.made, program.options = before


def with_stages_of(entries: CompiledForwards, call: Callable[[], Any]) -> list[GraphRecord]:
    """The records of the session's graphs, and of graphs that `call` is the first to need. Those
    that serve `call` have their stages. Random states are put back after it."""
    device = entries.session.program.runtime.device
    devices = [device] if device.type == "cuda" else []
    with replayed(entries) as replay, torch.random.fork_rng(devices):
        if (
            Provenance.name in replay.names
        ):  # the last stage that is plain aten, and compiles nothing
            replay.current = Provenance.name
        records = list(replay.backend.records)
        call()
        captured = replay.backend.records[len(records) :]
    serving = {(record.lora, *record.form.items()): n for n, record in enumerate(records)}
    for record in captured:
        n = serving.get((record.lora, *record.form.items()))
        if n is None:
            records.append(record)
        else:
            records[n] = replace(
                records[n], stages=record.stages, sizes=record.sizes, outlined=record.outlined
            )
    return records
