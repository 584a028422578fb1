"""The report's values, from a session, and the dumps that are written during compilation."""

from __future__ import annotations

import re
import weakref
from collections.abc import Mapping
from functools import partial

from lorafx.capture.record import GraphRecord, seen_sites
from lorafx.inspection.effects import deltas_of
from lorafx.inspection.explanation import (
    AdapterReport,
    BankReport,
    Explanation,
    GraphReport,
    NodeReport,
    SiteReport,
)
from lorafx.inspection.viewer.dump import (
    beside_compiling,
    folder_of,
    trace_graph,
    traced,
    write_graph,
)
from lorafx.inspection.viewer.graph_data import graph_data
from lorafx.inspection.viewer.page import Page
from lorafx.model.sites import Site, room_of
from lorafx.pass_order import pipeline
from lorafx.runtime.session import Session
from lorafx.torch_internals.shortcuts import states


def explained(session: Session, *, quick: bool = False) -> Explanation:
    """The report on a marked model. `quick`: only of what is known already."""
    program, config = session.program, session.program.config
    if not quick:
        program.look_at_modules()
    records = list(session.backend.records)
    lora = [record for record in records if record.lora]
    unseen = [site.path for site in program.sites if site not in seen_sites(lora)]
    shortcuts = states(program.options.shortcuts).items()
    return Explanation(
        model=type(program.model).__name__,
        lowering=program.options.lowering,
        sites=tuple(map(_site, program.sites)),
        banks=tuple(BankReport(g.parent, g.members, g.bank.nbytes) for g in program.groups),
        slots=config.max_adapters,
        max_rank=config.max_rank,
        room=room_of(program.groups),
        adapters=tuple(_adapter(session, name, quick=quick) for name in session.store.names),
        passes=tuple(str(pipeline(program.options)).splitlines()),
        shortcuts_off={name: state for name, state in shortcuts if state != "on"},
        prepared=program.prepared,
        graphs=tuple(map(graph_report, records)),
        unreached=tuple(unseen) if lora else (),
        replaced=tuple(program.site_watch.lines()),
    )


def _site(site: Site) -> SiteReport:
    parts = [
        ((part.name if part.selected else "") or "-", part.out_features) for part in site.parts
    ]
    return SiteReport(
        path=site.path,
        aliases=site.aliases,
        cls=type(site.module).__name__,
        registered=site.eligible.cls.__name__,
        in_features=site.in_features,
        out_features=site.out_features,
        dtype=site.dtype_name,
        parts=tuple(parts) if len(parts) > 1 else (),
        loose=tuple(site.loose_names),
        own_rows=site.own_rows,
    )


def _adapter(session: Session, name: str, *, quick: bool) -> AdapterReport:
    store, merged = session.store, session.base.merged
    stored = store[name]
    deltas = deltas_of(stored, session.program.groups, quick=quick)
    return AdapterReport(
        name=name,
        source=stored.source,
        rank=stored.rank,
        sites=stored.sites,
        slot=store.resident.get(name),
        pinned=name in store.pinned,
        merged=merged is not None and merged.name == name,
        norms=None if deltas is None else deltas.norms,
        idle=() if deltas is None else tuple(deltas.idle),
        why_idle="" if deltas is None else deltas.why_idle,
    )


def graph_report(record: GraphRecord) -> GraphReport:
    nodes: dict[int, list[str]] = {}
    for state in record.states:
        nodes.setdefault(state.node_key, []).append(state.site.path)
    first = {state.node_key: state for state in reversed(record.states)}
    served = [text for what, text in record.form.items() if what != "adapters"]
    return GraphReport(
        title=record.title,
        lora=record.lora,
        serves=", ".join([record.form.get("adapters", ""), *served]).strip(", "),
        reason=record.reason,
        seconds=dict(record.seconds),
        passes=tuple(record.passes),
        nodes=tuple(
            NodeReport(
                tuple(paths),
                first[key].form,
                first[key].strategy or "aten",
                _in_words(first[key].rows, record.symbols),
            )
            for key, paths in nodes.items()
        ),
        refusals=tuple(record.checks.refusals),
        outlined=tuple(map(str, record.outlined)),
        saved=record.saved,
        verified="" if record.numeric is None else record.numeric.result,
    )


def _in_words(text: str, symbols: Mapping[str, str]) -> str:
    return re.sub(r"\b[su][0-9]+\b", lambda found: symbols.get(found[0], found[0]), text)


class Dumps:
    """Writes the requested outputs of each graph of a session, as `Backend.recorded`."""

    def __init__(self, session: Session) -> None:
        self._session = weakref.ref(session)
        self._page: Page | None = None

    def __call__(self, record: GraphRecord) -> None:
        session = self._session()
        if session is None or not record.keeps_stages:
            return
        program, records = session.program, session.backend.records
        if records[:1] in ([], [record]):
            for index, report in enumerate(program.prepared):
                traced(f"model_{index:02d}_{report.name}", partial(str, report))
        trace_graph(record)
        traced("explain", lambda: str(explained(session)))
        folder = folder_of(program)
        if folder is None:
            return
        if self._page is None or self._page.folder != folder:
            name = type(program.model).__name__
            self._page = Page(folder, name, prepared=program.prepared)
        with beside_compiling(folder):
            write_graph(folder, record)
            self._page.add(record, graph_data(record, program))
            if record in records:  # it did not fail
                self._page.texts["explain.txt"] = f"{explained(session)}\n"
            self._page.write()
