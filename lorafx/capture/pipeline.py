"""The pass pipeline: its order, and the driver that alone verifies, times, cleans and dumps."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import fx

from lorafx.capture.dump import GraphDump
from lorafx.capture.failures import in_pass
from lorafx.capture.verify import check_graph, output_values
from lorafx.config import Options
from lorafx.errors import ConfigError, nearest
from lorafx.graph.context import Context
from lorafx.passes.fuse.fuse import Fuse
from lorafx.passes.give_out import GiveOut
from lorafx.passes.lower.lower import Lower
from lorafx.passes.match.match import Match
from lorafx.passes.outline.outline import Outline
from lorafx.passes.pack import Pack
from lorafx.passes.plan import Plan
from lorafx.passes.provenance import Provenance
from lorafx.passes.rescale import Rescale


class GraphPass(Protocol):
    """One rewrite of the functional ATen graph.

    `required` passes cannot be switched off: without them a delta could be dropped silently.
    `run` returns the number of edits it made. It neither lints nor recompiles nor removes dead
    code; the driver does.
    """

    @property
    def name(self) -> str: ...

    @property
    def required(self) -> bool: ...

    def run(self, gm: fx.GraphModule, ctx: Context) -> int: ...


#: `outline` is last: it compares what the lowering made of each layer, so what differs there (a
#: pinned strategy, say) keeps layers apart.
PIPELINE: tuple[GraphPass, ...] = (
    Match(),
    GiveOut(),
    Provenance(),
    Rescale(),
    Fuse(),
    Pack(),
    Plan(),
    Lower(),
    Outline(),
)


@dataclass
class PassReport:
    """What one pass did to one graph."""

    name: str
    edits: int
    seconds: float
    nodes: int


def check_options(options: Options) -> None:
    """Every pass that `options.passes` names exists and can be switched off, or ConfigError."""
    known = {item.name: item for item in PIPELINE}
    for name, enabled in options.passes.items():
        if name not in known:
            raise ConfigError(
                f"unknown pass {name!r}{nearest(name, known)}; passes are {', '.join(known)}"
            )
        if known[name].required and not enabled:
            raise ConfigError(f"pass {name!r} cannot be switched off: adapters would be dropped")


def run_pipeline(
    gm: fx.GraphModule,
    ctx: Context,
    dump: GraphDump,
    after_pass: Callable[[str, fx.GraphModule], None] | None = None,
) -> list[PassReport]:
    """Run all passes that are switched on over `gm`, in place.

    `after_pass(name, gm)` is called with the graph as captured ("captured") and after each pass;
    numeric verification keeps its copies that way.
    """
    options = ctx.program.options
    passes = [item for item in PIPELINE if options.passes.get(item.name, True)]
    outputs = output_values(gm)

    def check(pass_name: str) -> None:
        check_graph(pass_name, gm, ctx, outputs)

    verify = check if options.verify != "off" else None
    return run_passes(passes, gm, ctx, dump, verify, after_pass)


def run_passes(
    passes: Sequence[Any],
    gm: fx.GraphModule,
    ctx: Any,
    dump: GraphDump | None,
    check: Callable[[str], None] | None,
    after_pass: Callable[[str, fx.GraphModule], None] | None = None,
) -> list[PassReport]:
    """Run `passes` over `gm`, in place, each with the context that it is made for.

    `check(name)` looks at the graph after each pass; `dump` and `after_pass` get it also as
    captured.
    """
    reports: list[PassReport] = []
    if dump is not None:
        dump.graph("captured", gm)
    if after_pass is not None:
        after_pass("captured", gm)
    for item in passes:
        start = time.perf_counter()
        with in_pass(item.name, getattr(item, "required", False)):
            edits = item.run(gm, ctx)
        gm.graph.eliminate_dead_code(_is_impure)
        gm.recompile()
        if check is not None:
            check(item.name)
        seconds = time.perf_counter() - start
        reports.append(PassReport(item.name, edits, seconds, len(gm.graph.nodes)))
        if dump is not None:
            dump.graph(item.name, gm, edits=edits, seconds=seconds)
        if after_pass is not None:
            after_pass(item.name, gm)
    return reports


def _is_impure(node: fx.Node) -> bool:
    """Placeholders must stay (the executable's calling convention), and so must effects."""
    return node.op == "placeholder" or node.is_impure()
