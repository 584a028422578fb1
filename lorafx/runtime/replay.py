"""Captures a program's graphs once more, and runs them operator by operator as they were after one
of the passes.

Each call may choose another stage. Weights, banks and slots are those of the program.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import Tensor, fx

from lorafx.capture.backend import Backend
from lorafx.capture.lowering import Boxed, Lowering, ReferenceLowering, Stages, lowering_for
from lorafx.capture.record import GraphRecord, Stage
from lorafx.config import Options
from lorafx.pass_order import CAPTURED, pipeline
from lorafx.passes.outline import Outline
from lorafx.passes.products import Join
from lorafx.passes.provenance import Provenance
from lorafx.runtime.entry import entered
from lorafx.runtime.forwards import CompiledForwards
from lorafx.runtime.session import Session

#: Runs a stage on its inputs.
Runner = Callable[[Stage, Sequence[Any]], Any]


class Replay:
    """The stages of all graphs of a program.

    Attributes:
        names: the names of the stages, in their order.
        current: the name of the stage that runs.
    """

    def __init__(self, session: Session) -> None:
        options = session.program.options
        self.names = (CAPTURED, *(item.name for item in pipeline(options).graph))
        self.current = self.names[-1]
        self._runner: Runner = lambda stage, inputs: stage.graph(*inputs)
        # With records this is not the program's first call: modules may keep tensors of requests.
        self.backend = Backend(
            session.program,
            entered,
            lowering=_StageLowering(self, lowering_for(options)),
            records=session.backend.records,
        )

    @contextmanager
    def running(self, name: str, runner: Runner) -> Iterator[None]:
        """Inside the block `runner` runs the stage `name`."""
        former = self.current, self._runner
        self.current, self._runner = name, runner
        try:
            yield
        finally:
            self.current, self._runner = former

    @property
    def unjoined(self) -> str:
        """The last stage in which the operators of a layer are in the graph itself, and a product
        and its delta are separate operators."""
        for name in (Join.name, Outline.name):
            if name in self.names:
                return self.names[self.names.index(name) - 1]
        return self.names[-1]

    def run(self, stages: Mapping[str, Stage], arguments: Sequence[Any]) -> Any:
        """Run the current one of a graph's stages."""
        stage = stages[self.current]
        return self._runner(stage, arguments[: stage.input_count])


class _StageLowering(ReferenceLowering):
    """Traces as the program's lowering does, and runs the current stage; graphs of the base run
    node by node."""

    replays = True

    def __init__(self, replay: Replay, lowering: Lowering) -> None:
        self._replay, self._lowering = replay, lowering

    def decompositions(self) -> dict[Any, Callable[..., Any]]:
        return self._lowering.decompositions()

    def compile(self, gm: fx.GraphModule, inputs: Sequence[Any], stages: Stages = ()) -> Boxed:
        return partial(self._replay.run, {stage.name: stage for stage in stages})


def options_of_replays(options: Options) -> Options:
    """The options with which graphs are captured once more."""
    return replace(options, verify="lint", cache=None, dump=None)


@contextmanager
def replayed(entries: CompiledForwards) -> Iterator[Replay]:
    """Inside the block, which holds the session's lock, calls of the model run the current stage.
    Graphs and options are restored afterwards."""
    session, program = entries.session, entries.session.program
    with session.lock:
        former = session.backend, entries.made, program.options
        replay = Replay(session)
        try:
            program.options = options_of_replays(program.options)
            session.backend, entries.made = replay.backend, {}
            yield replay
        finally:
            session.backend, entries.made, program.options = former


def with_stages_of(entries: CompiledForwards, call: Callable[[], Any]) -> list[GraphRecord]:
    """The records of the session's graphs, and of graphs that `call` is the first to need. Those
    that serve `call` have their stages."""
    with replayed(entries) as replay:
        # This stage is plain aten, so no kernel is compiled.
        if Provenance.name in replay.names:
            replay.current = Provenance.name
        records = list(replay.backend.records)
        call()
        captured = replay.backend.records[len(records) :]
    serving = {(record.lora, *record.form.items()): i for i, record in enumerate(records)}
    for record in captured:
        index = serving.get((record.lora, *record.form.items()))
        if index is None:
            records.append(record)
        else:
            records[index] = replace(
                records[index], stages=record.stages, sizes=record.sizes, outlined=record.outlined
            )
    return records


# --- the values of a stage ---


@dataclass
class Run:
    """The values of a stage's nodes in a call of its graph."""

    stage: Stage
    values: dict[str, Tensor]

    @property
    def graph(self) -> fx.Graph:
        return self.stage.graph.graph

    @property
    def returned(self) -> list[fx.Node]:
        return list(self.graph.output_node().all_input_nodes)


class _Values(fx.Interpreter):
    """Copies the value of each node when it is computed: later operators may overwrite it."""

    def __init__(self, gm: fx.GraphModule) -> None:
        super().__init__(gm)
        self.copies: dict[str, Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, Tensor) and n.op != "placeholder":
            self.copies[n.name] = value.clone()
        return value


def recorded(stage: Stage, inputs: Sequence[Any], runs: list[Run]) -> Any:
    """The results of a stage; appends the values of its nodes to `runs`."""
    interpreter = _Values(stage.graph)
    results = interpreter.run(*inputs)
    runs.append(Run(stage, interpreter.copies))
    return results
