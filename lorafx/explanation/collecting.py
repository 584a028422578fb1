"""The report's values, from a session."""

from __future__ import annotations

import re
from collections.abc import Mapping

from lorafx.capture.record import GraphRecord, seen_sites
from lorafx.explanation.delta_norms import deltas_of, known_deltas
from lorafx.explanation.report import (
    AdapterReport,
    BankReport,
    Explanation,
    GraphReport,
    NodeReport,
    RefusalReport,
    SiteReport,
)
from lorafx.model.sites import Group, Site, room_of
from lorafx.pass_order import pipeline
from lorafx.session.session import Session
from lorafx.torch_internals.shortcuts import states


def report_of(session: Session, *, quick: bool = False) -> Explanation:
    """The report on a compiled model. `quick`: of what is known already; nothing is looked at."""
    program, config = session.program, session.program.config
    if not quick:
        program.look_at_modules()
    records = list(session.backend.records)
    lora = [record for record in records if record.lora]
    unseen = [site.path for site in program.sites if site not in seen_sites(lora)]
    return Explanation(
        model=type(program.model).__name__,
        lowering=program.options.lowering,
        sites=tuple(map(site_report, program.sites)),
        banks=tuple(map(bank_report, program.groups)),
        slots=config.max_adapters,
        max_rank=config.max_rank,
        slot_rank=config.slot_rank,
        room=room_of(program.groups),
        adapters=tuple(adapter_report(session, name, quick=quick) for name in session.store.names),
        passes=tuple(str(pipeline(program.options)).splitlines()),
        shortcuts_off={
            name: state
            for name, state in states(program.options.shortcuts).items()
            if state != "on"
        },
        prepared=program.prepared,
        graphs=tuple(map(graph_report, records)),
        unreached=tuple(unseen) if lora else (),
        replaced=tuple(program.site_watch.lines()),
    )


def site_report(site: Site) -> SiteReport:
    """One site."""
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


def bank_report(group: Group) -> BankReport:
    """The bank of one group."""
    return BankReport(group.parent, group.members, group.bank.nbytes)


def adapter_report(session: Session, name: str, *, quick: bool = False) -> AdapterReport:
    """One loaded adapter."""
    store, merged = session.store, session.base.merged
    stored, groups = store[name], session.program.groups
    deltas = known_deltas(stored) if quick else deltas_of(stored, groups)
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
        notes=stored.notes,
    )


def graph_report(record: GraphRecord) -> GraphReport:
    """One graph."""
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
                in_words(first[key].rows, record.symbols),
            )
            for key, paths in nodes.items()
        ),
        refusals=tuple(
            RefusalReport(item.paths, item.when, item.reason) for item in record.refusals
        ),
        outlined=tuple(map(str, record.outlined)),
        saved=record.saved,
        verified="" if record.numeric is None else record.numeric.result,
    )


def in_words(text: str, symbols: Mapping[str, str]) -> str:
    """`text` with what its symbols stand for."""
    return re.sub(r"\b[su][0-9]+\b", lambda found: symbols.get(found[0], found[0]), text)
