"""What is known about one compiled graph; `explain`, `dump` and the tests read it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lorafx.capture.checks import Checks, RefusedSites
from lorafx.capture.dump import GraphDump
from lorafx.capture.verify import NumericCheck
from lorafx.graph.context import Context, Outlined, Refusal, SiteState
from lorafx.model.sites import Site
from lorafx.program.preparation import PassReport
from lorafx.viewer.stages import GraphView, Span, exclusive


@dataclass(eq=False)
class GraphRecord:
    """One graph. `checks` is what its executable keeps of it; `saved` says what became of it in the
    folder of saved graphs. `form`, `reason` and `spans` are those of lorafx.capture.told."""

    title: str
    lora: bool
    dump: GraphDump
    checks: Checks
    passes: list[PassReport] = field(default_factory=list)
    states: list[SiteState] = field(default_factory=list)
    refusals: list[Refusal] = field(default_factory=list)
    outlined: list[Outlined] = field(default_factory=list)
    saved: str = ""
    form: Mapping[str, str] = field(default_factory=dict)
    reason: str = ""
    spans: list[Span] = field(default_factory=list)
    #: The symbols in `states`, in words.
    symbols: dict[str, str] = field(default_factory=dict)
    #: What is compared at the graph's first call, with `Options(verify="numeric")`.
    numeric: NumericCheck | None = None

    @property
    def seconds(self) -> dict[str, float]:
        """What compiling it took, by whom, in the order in which they began."""
        return exclusive(self.spans)

    @property
    def view(self) -> GraphView:
        """What the viewer shows of it."""
        dump = self.dump
        facts = [f"outline: {item}" for item in self.outlined]
        facts += [self.saved] if self.saved else []
        return GraphView(
            self.title, self.reason, dump.named_views, self.spans, self.form, facts, dump.sources
        )

    def to_save(self) -> dict[str, Any]:
        """What another process needs of it."""
        left_out = ("dump", "saved", "title", "reason", "spans", "numeric")
        return {name: value for name, value in vars(self).items() if name not in left_out}

    @classmethod
    def loaded(cls, title: str, values: Mapping[str, Any], several: list[bool]) -> GraphRecord:
        """The record of a graph that another process compiled. `several`: as in `Checks`, of this
        program."""
        record = cls(title, dump=GraphDump(title, None), saved="loaded from the folder", **values)
        record.checks.several = several
        return record

    def note(self, ctx: Context) -> None:
        """Keep what the passes found out."""
        for key, states in enumerate(ctx.states.values()):
            for state in states:
                state.node_key = key
                # Nodes would hold the whole graph alive.
                state.use = state.packed_weight = state.packed_bias = None
            self.states.extend(states)
        self.symbols = {symbol: str(size) for symbol, size in self.dump.names.symbols.items()}
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
