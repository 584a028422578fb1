"""Facts about a compiled graph, for `explain`, `dump` and tests.

On request a copy of the graph after each pass, a stage, is kept. Dumps, names, bisection and the
viewer's page are made from the stages.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal, NamedTuple

from torch import Tensor, fx

from lorafx.capture.checks import Checks
from lorafx.errors import ProvenanceError
from lorafx.ownership.flow import plain_path
from lorafx.pass_order import CAPTURED
from lorafx.program.context import Context, Outlined, SiteState
from lorafx.program.frame import Frame, batch_symbols, fake_value
from lorafx.program.inputs import FrameInput
from lorafx.program.program import PassReport
from lorafx.program.refusals import LastingRefusal, Refusal

#: The path of a graph's module ("" for the main graph), and a node's name.
Place = tuple[str, str]


@dataclass(frozen=True, eq=False)
class Stage:
    """A copy of a graph after the pass `name`, or before the first one if `report` is None, with
    the inputs of the main graph by name, and the sites of nodes by place."""

    graph: fx.GraphModule
    name: str = CAPTURED
    report: PassReport | None = None
    inputs: Mapping[str, FrameInput] = field(default_factory=dict)
    sites: Mapping[Place, tuple[SiteState, ...]] = field(default_factory=dict)
    refusals: tuple[Refusal, ...] = ()

    @classmethod
    def of(cls, gm: fx.GraphModule, ctx: Context, done: PassReport | str) -> Stage:
        modules = gm.named_modules()
        paths = {item.graph: path for path, item in modules if isinstance(item, fx.GraphModule)}
        sites: dict[Place, tuple[SiteState, ...]] = {}
        for node, states in ctx.states.items():
            plain = tuple(
                replace(state, use=None, packed_weight=None, packed_bias=None) for state in states
            )
            for home in ctx.homes.get(node, (node,)):
                if home.graph not in paths:
                    continue  # Inductor has made the body anew
                place = paths[home.graph], home.name
                sites[place] = sites.get(place, ()) + plain
        name, report = (done, None) if isinstance(done, str) else (done.name, done)
        return cls(copied(gm), name, report, _inputs_of(ctx.frame), sites, tuple(ctx.refusals))

    @cached_property
    def graphs(self) -> dict[str, fx.Graph]:
        """The main graph, at "", and the graphs of the modules that it calls, by path."""
        modules = self.graph.named_modules()
        return {path: item.graph for path, item in modules if isinstance(item, fx.GraphModule)}

    def paths(self, node: fx.Node) -> tuple[str, ...]:
        return tuple(state.site.path for state in self.sites.get(("", node.name), ()))

    @cached_property
    def input_count(self) -> int:
        return len(self.graph.graph.find_nodes(op="placeholder"))


def copied(gm: fx.GraphModule) -> fx.GraphModule:
    """A copy of the graph and of the graphs that it calls, with the same fake values."""
    result = fx.GraphModule(gm, copy.deepcopy(gm.graph))
    for name, child in result.named_children():
        if isinstance(child, fx.GraphModule):
            setattr(result, name, copied(child))
    return result


def _inputs_of(frame: Frame) -> dict[str, FrameInput]:
    """The inputs by name. A bank that is looked up by a weight has the site of the weight."""
    inputs = {node.name: item for node, item in frame.by_node.items()}
    for (position, index, _), node in frame.extra_nodes.items():
        sites = frame.inputs[position].sites
        if inputs[node.name].kind == "bank" and index < len(sites):
            inputs[node.name] = replace(inputs[node.name], sites=(sites[index],))
    return inputs


class Size(NamedTuple):
    """The meaning of a symbol: a dimension of an input, and what it counts, if that is known."""

    of: str
    dim: int
    counts: Literal["requests", "tokens", ""] = ""

    @property
    def name(self) -> str:
        return self.counts or f"{self.of}_size_{self.dim}"

    @property
    def words(self) -> str:
        counted = {"requests": "requests of the batch: ", "tokens": "tokens of each request: "}
        return f"{counted.get(self.counts, '')}dimension {self.dim} of {self.of}"

    def __str__(self) -> str:
        return f"{self.of}.shape[{self.dim}]"


def _sizes_of(frame: Frame) -> dict[str, Size]:
    """The meanings of symbols in the sizes of inputs; arguments of the call come first."""
    sizes: dict[str, Size] = {}
    try:
        requests = {str(symbol) for symbol in batch_symbols(frame)}
    except ProvenanceError:
        requests = set()
    for node, item in sorted(frame.by_node.items(), key=lambda pair: pair[1].kind != "argument"):
        value = fake_value(node)
        if not isinstance(value, Tensor):
            continue
        label = item.role.argument if item.role is not None else identifier(item)
        for dim, size in enumerate(value.shape):
            symbol = str(size)
            if isinstance(size, int) or not size.node.expr.is_Symbol or symbol in sizes:
                continue
            counts: Literal["requests", "tokens", ""] = ""
            if symbol in requests or item.requests_dim == dim:
                counts = "requests"
            elif item.kind == "argument" and frame.token_dims.get(label) == dim:
                counts = "tokens"
            sizes[symbol] = Size(label, dim, counts)
    return sizes


def identifier(item: FrameInput) -> str:
    """An identifier made from Dynamo's source of an input."""
    return plain_path(item.label) or re.sub(r"\W+", "_", item.label.removeprefix("L")).strip("_")


@dataclass(eq=False)
class GraphRecord:
    """The record of a compiled graph.

    Attributes:
        checks: the checks of its executable.
        keeps_stages: whether `stages` gets a copy of the graph after each pass.
        sources: generated code by file name, as a text or a function that makes it.
        saved: whether it was saved to or loaded from a folder, or why not.
        form, reason: the form of its call, and why no earlier graph serves that.
        seconds: the time of its compilation, by part.
        sizes: the meanings of symbols, by name.
    """

    title: str
    lora: bool
    checks: Checks
    keeps_stages: bool = False
    stages: list[Stage] = field(default_factory=list)
    sources: dict[str, str | Callable[[], str]] = field(default_factory=dict)
    passes: list[PassReport] = field(default_factory=list)
    states: list[SiteState] = field(default_factory=list)
    outlined: list[Outlined] = field(default_factory=list)
    saved: str = ""
    form: Mapping[str, str] = field(default_factory=dict)
    reason: str = ""
    seconds: dict[str, float] = field(default_factory=dict)
    sizes: dict[str, Size] = field(default_factory=dict)

    def to_save(self) -> dict[str, Any]:
        saved = ("lora", "checks", "passes", "states", "outlined", "form", "sizes")
        return {name: getattr(self, name) for name in saved}

    def after(self, gm: fx.GraphModule, ctx: Context, done: PassReport | str) -> None:
        """Note the graph after a pass; before the first one `done` is the name of the stage."""
        self.report(done)
        if self.keeps_stages:
            self.outlined = ctx.outlined
            self._note_sizes(ctx.frame)
            self.stages.append(Stage.of(gm, ctx, done))

    def report(self, done: PassReport | str) -> None:
        if not isinstance(done, str):
            self.passes.append(done)

    def _note_sizes(self, frame: Frame) -> None:
        # Earlier meanings are kept: a pass may have unified symbols that earlier stages show.
        self.sizes = {**_sizes_of(frame), **self.sizes}

    def code(self, text: str) -> None:
        number = sum(name.startswith("inductor") for name in self.sources)
        self.sources[f"inductor{f'-{number}' if number else ''}.py"] = text

    def note(self, ctx: Context) -> None:
        for key, states in enumerate(ctx.states.values()):
            for state in states:
                state.node_key = key
                # References to nodes would keep the whole graph alive.
                state.use = state.packed_weight = state.packed_bias = None
            self.states.extend(states)
        self._note_sizes(ctx.frame)
        self.outlined = ctx.outlined
        self.checks.sites = [state.site.path for state in self.states]
        self.checks.refusals = [
            LastingRefusal(item.paths, item.when, item.reason) for item in ctx.refusals
        ]
        self.checks.handover, self.checks.inside = ctx.handover, ctx.frame.inside


def seen_sites(records: Sequence[GraphRecord]) -> set[str]:
    """The paths of the sites that some graph serves or refuses."""
    refusals = (item for record in records for item in record.checks.refusals)
    served = {state.site.path for record in records for state in record.states}
    return served.union(*(item.sites for item in refusals))
