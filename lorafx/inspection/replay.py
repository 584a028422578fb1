"""A program's graphs captured once more, and run operator by operator as one of the passes left
them.

Which stage runs is chosen call by call; weights, banks and slots are the program's own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn

from lorafx.capture.backend import Backend
from lorafx.capture.lowering import Lowering, ReferenceLowering, lowering_for
from lorafx.capture.record import GraphRecord, Stage
from lorafx.model.sites import Site
from lorafx.pass_order import CAPTURED, pipeline
from lorafx.passes.outline.outline import Outline
from lorafx.passes.products import Join
from lorafx.passes.provenance import Provenance
from lorafx.runtime.entry import CompiledForwards, Entry, entered
from lorafx.runtime.requests import LastCall
from lorafx.runtime.session import Session

#: Runs a stage on its inputs.
Runner = Callable[[Stage, Sequence[Any]], Any]


class Staged(Protocol):
    """A model whose calls are made by entries: a `CompiledModel`, or what stands for one."""

    _entries: CompiledForwards
    model: nn.Module

    @property
    def _session(self) -> Session: ...

    @property
    def sites(self) -> Sequence[Site]: ...

    def entry(self, module: nn.Module) -> Entry: ...

    def __call__(self, *, adapter_names: Sequence[Any], **inputs: Any) -> Any: ...


class Replay:
    """The stages of all graphs of a program.

    Attributes:
        lowering: the program's own.
        names: of the stages, in their order.
        current: which stage runs.
    """

    def __init__(self, session: Session) -> None:
        options = session.program.options
        self.lowering = lowering_for(options)
        self.names = (CAPTURED, *(item.name for item in pipeline(options).graph))
        self.current = self.names[-1]
        self._runner: Runner = lambda stage, given: stage.graph(*given)
        self.backend = Backend(session.program, entered)
        self.backend.lowering = _Replayed(self.lowering)
        self.backend.replay = self._running
        # It is not the first call of this program: what modules keep may be of a request.
        self.backend.records.extend(session.backend.records)
        self._earlier = len(self.backend.records)

    @property
    def records(self) -> list[GraphRecord]:
        """The graphs that were captured, with their stages."""
        return self.backend.records[self._earlier :]

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
    def flat(self) -> str:
        """The last stage in which a layer's operators stand in the graph itself."""
        return self._before(Outline.name) or self.names[-1]

    @property
    def apart(self) -> str:
        """The last such stage in which a product and its delta are operators of their own."""
        return self._before(Join.name) or self.flat

    def _before(self, name: str) -> str:
        return self.names[self.names.index(name) - 1] if name in self.names else ""

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
def replayed(compiled: Staged) -> Iterator[Replay]:
    """Inside, calls of the model run the stage that is chosen. Its lock is held, and its graphs and
    options are put back."""
    session = compiled._session
    program = session.program
    with session.lock:
        entries = compiled._entries
        before = session.backend, entries.made, program.options
        replay = Replay(session)
        try:
            program.options = replace(program.options, verify="lint", cache=None, dump=None)
            session.backend, entries.made = replay.backend, {}
            yield replay
        finally:
            session.backend, entries.made, program.options = before


class MadeCall(NamedTuple):
    """A call that can be made again.

    Attributes:
        method: of the compiled model.
        arguments: None where the call had more than tensors and plain values.
        asked: whom it served.
    """

    method: str
    arguments: LastCall | None
    asked: Mapping[str, Any]


def captured_again(compiled: Staged, calls: Sequence[MadeCall]) -> list[GraphRecord]:
    """The graphs of these calls with their stages; of a call that cannot be made, none.

    Ones stand for tensors that are gone: graphs depend on shapes, as a rule.
    """
    device = compiled._session.program.runtime.device
    devices = [device] if device.type == "cuda" else []
    with replayed(compiled) as replay, torch.random.fork_rng(devices):
        if Provenance.name in replay.names:  # plain aten, which knows its rows
            replay.current = Provenance.name
        for call in calls:
            found = None if call.arguments is None else call.arguments.arguments(stand_ins=True)
            if found is not None:
                with suppress(Exception):  # an adapter that is gone, or the model's own
                    getattr(compiled, call.method)(*found[0], **found[1], **call.asked)
        return replay.records
