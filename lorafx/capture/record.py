"""Facts about a compiled graph, for `explain`, `dump` and tests."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import fx

from lorafx.capture.checks import Checks, RefusedSites
from lorafx.capture.node_names import Size, sizes_of
from lorafx.capture.recorder import Stage, stage_of, stage_of_base
from lorafx.model.sites import Site
from lorafx.program.context import Context, Outlined, Refusal, SiteState
from lorafx.program.frame import Frame
from lorafx.program.preparation import PassReport


class Span(NamedTuple):
    """A part of a compilation, in seconds of `time.perf_counter`."""

    name: str
    start: float
    end: float


def exclusive(spans: Sequence[Span]) -> dict[str, float]:
    """Seconds by name, in order of beginning, without those of nested parts."""
    found: dict[str, float] = {}
    around: list[Span] = []
    for span in sorted(spans, key=lambda item: (item.start, -item.end)):
        while around and around[-1].end <= span.start:
            around.pop()
        seconds = span.end - span.start
        found[span.name] = found.get(span.name, 0.0) + seconds
        if around:
            found[around[-1].name] -= seconds
        around.append(span)
    return found


@dataclass(eq=False)
class GraphRecord:
    """A graph's record.

    Attributes:
        checks: the part kept by its executable.
        keeps_stages: whether `stages` gets a copy of the graph after each pass.
        sources: generated sources by file name: a text, or a function that makes it.
        saved: its fate in the folder of saved graphs.
        form, reason: its kind of call, and why no earlier graph serves that.
    """

    title: str
    lora: bool
    checks: Checks
    keeps_stages: bool = False
    stages: list[Stage] = field(default_factory=list)
    sources: dict[str, str | Callable[[], str]] = field(default_factory=dict)
    passes: list[PassReport] = field(default_factory=list)
    states: list[SiteState] = field(default_factory=list)
    refusals: list[Refusal] = field(default_factory=list)
    outlined: list[Outlined] = field(default_factory=list)
    saved: str = ""
    form: Mapping[str, str] = field(default_factory=dict)
    reason: str = ""
    spans: list[Span] = field(default_factory=list)
    sizes: dict[str, Size] = field(default_factory=dict)
    symbols: dict[str, str] = field(default_factory=dict)

    @property
    def seconds(self) -> dict[str, float]:
        return exclusive(self.spans)

    def to_save(self) -> dict[str, Any]:
        saved = ("lora", "checks", "passes", "states", "refusals", "outlined", "form", "symbols")
        return {name: getattr(self, name) for name in saved}

    @classmethod
    def loaded(cls, title: str, values: Mapping[str, Any], several: list[bool]) -> GraphRecord:
        """The record of a loaded graph; `several` as in `Checks`."""
        record = cls(title, saved="loaded from the folder", **values)
        record.checks.several = several
        return record

    def after(self, gm: fx.GraphModule, ctx: Context, report: PassReport | None) -> None:
        """Note a pass's result, or the captured graph if `report` is None."""
        if report is not None:
            self.passes.append(report)
        if self.keeps_stages:
            self.outlined = ctx.outlined
            self.sizes = {**sizes_of(ctx.frame, ctx.frame.by_node), **self.sizes}
            self.stages.append(stage_of(gm, ctx, report))

    def keep_base(self, gm: fx.GraphModule, frame: Frame) -> None:
        if self.keeps_stages:
            inputs = gm.graph.find_nodes(op="placeholder")
            self.sizes = sizes_of(frame, dict(zip(inputs, frame.inputs, strict=True)))
            self.stages.append(stage_of_base(gm, frame))

    def code(self, text: str) -> None:
        number = sum(name.startswith("inductor") for name in self.sources)
        self.sources[f"inductor{f'-{number}' if number else ''}.py"] = text

    def note(self, ctx: Context) -> None:
        for key, states in enumerate(ctx.states.values()):
            for state in states:
                state.node_key = key
                # Nodes would keep the whole graph alive.
                state.use = state.packed_weight = state.packed_bias = None
            self.states.extend(states)
        sizes = sizes_of(ctx.frame, ctx.frame.by_node)
        self.symbols = {symbol: str(size) for symbol, size in sizes.items()}
        self.refusals, self.outlined = ctx.refusals, ctx.outlined
        self.checks.sites = [state.site.path for state in self.states]
        self.checks.refusals = [
            RefusedSites(item.paths, item.when, item.reason) for item in ctx.refusals
        ]
        self.checks.handover, self.checks.inside = ctx.handover, ctx.frame.inside


def seen_sites(records: Sequence[GraphRecord]) -> set[Site]:
    """The sites that some graph serves or refuses."""
    found = {state.site for record in records for state in record.states}
    found.update(site for record in records for item in record.refusals for site in item.sites)
    return found
