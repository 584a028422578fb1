"""A program's graphs as each pass left them, run operator by operator in the place of what they are
compiled to.

A second backend captures the graphs of a call anew, with the same passes, and keeps a copy after
each. Which of them runs is chosen call by call; weights, banks and slots are the program's own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from torch import fx, nn

from lorafx.capture.backend import Backend
from lorafx.capture.lowering import ReferenceLowering, lowering_for
from lorafx.capture.verify import copied
from lorafx.graph.context import Context
from lorafx.model.sites import Site
from lorafx.pass_order import CAPTURED, GraphPass, pipeline
from lorafx.passes.join import Join
from lorafx.passes.outline.outline import Outline
from lorafx.serving.entries import Entries
from lorafx.serving.entry import Entry, entered
from lorafx.session.session import Session


class Staged(Protocol):
    """A model whose calls are made by entries: a `CompiledModel`, or what stands for one."""

    _entries: Entries
    model: nn.Module

    @property
    def _session(self) -> Session: ...

    @property
    def sites(self) -> Sequence[Site]: ...

    def entry(self, module: nn.Module) -> Entry: ...

    def __call__(self, *, adapter_names: Sequence[Any], **inputs: Any) -> Any: ...


@dataclass(frozen=True)
class Stage:
    """One graph after one pass.

    Attributes:
        inputs: how many it takes; passes behind may add some.
        sites: name of a node -> paths of the sites that it computes.
    """

    graph: fx.GraphModule
    inputs: int
    sites: dict[str, tuple[str, ...]]


@dataclass
class Stages:
    """The stages of all graphs of a program.

    Attributes:
        names: of the stages, in their order.
        current: which one runs.
        runner: runs a stage on its inputs in another way than as it is.
    """

    program_lowering: Any
    names: tuple[str, ...]
    current: str = ""
    graphs: list[dict[str, Stage]] = field(default_factory=list)
    runner: Callable[[Stage, Sequence[Any]], Any] | None = None

    @property
    def flat(self) -> str:
        """The last stage in which a layer's operators stand in the graph itself."""
        outlined = Outline.name in self.names
        return self.names[self.names.index(Outline.name) - 1] if outlined else self.names[-1]

    @property
    def apart(self) -> str:
        """The last such stage in which a product and its delta are operators of their own."""
        joined = Join.name in self.names
        return self.names[self.names.index(Join.name) - 1] if joined else self.flat

    # --- a lowering ---

    def decompositions(self) -> dict[Any, Callable[..., Any]]:
        found: dict[Any, Callable[..., Any]] = self.program_lowering.decompositions()
        return found

    def base(self, gm: fx.GraphModule, examples: Sequence[Any]) -> Callable[..., Any]:
        return ReferenceLowering().base(gm, examples)

    def compile(self, gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[[list[Any]], Any]:
        own = self.graphs[-1]  # its passes have just ended
        return lambda arguments: self._run(own, arguments)

    # --- what keeps graphs, and runs them ---

    def keeper(self, ctx: Context) -> Callable[[GraphPass | None, fx.GraphModule], None]:
        """What keeps a graph after each pass."""
        own: dict[str, Stage] = {}
        self.graphs.append(own)

        def keep(item: GraphPass | None, gm: fx.GraphModule) -> None:
            inputs = sum(node.op == "placeholder" for node in gm.graph.nodes)
            sites: dict[str, tuple[str, ...]] = {}
            for node, states in ctx.states.items():
                place = ctx.homes.get(node, (node,))[0]
                paths = tuple(state.site.path for state in states)
                sites[place.name] = sites.get(place.name, ()) + paths
            own[item.name if item else CAPTURED] = Stage(copied(gm), inputs, sites)

        return keep

    def _run(self, own: dict[str, Stage], arguments: list[Any]) -> Any:
        stage = own[self.current]
        given = arguments[: stage.inputs]
        return stage.graph(*given) if self.runner is None else self.runner(stage, given)


@contextmanager
def staged(compiled: Staged) -> Iterator[Stages]:
    """Inside, calls of the model run the stage that is chosen. Its lock is held, and its graphs and
    options are put back."""
    session = compiled._session
    program = session.program
    with session.lock:
        backend, made, options = session.backend, compiled._entries.made, program.options
        names = (CAPTURED, *(item.name for item in pipeline(options).graph))
        stages = Stages(lowering_for(options), names, current=names[-1])
        try:
            program.options = replace(options, verify="lint", cache=None, dump=None)
            session.backend = Backend(program, entered)
            session.backend.lowering, session.backend.keeper = stages, stages.keeper
            # It is not the first call of this program: what modules keep may be of a request.
            session.backend.records.extend(backend.records)
            compiled._entries.made = {}
            yield stages
        finally:
            session.backend, compiled._entries.made = backend, made
            program.options = options
