"""`explain`: reads what it shows from a compiled model, or predicts it.

For a model that is not compiled, the first passes over the model select the sites, and banks are
allocated on the meta device, so no weight is read.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace

import torch
from torch import Tensor, nn

from lorafx.adapter_store.store import info
from lorafx.capture.record import GraphRecord, seen_sites
from lorafx.config import LoraConfig, Options
from lorafx.inspection.delta_norms import deltas_of
from lorafx.inspection.explanation import (
    AdapterReport,
    BankReport,
    Explanation,
    GraphReport,
    NodeReport,
    SiteReport,
)
from lorafx.kernels.cost.roofline import factor_elements
from lorafx.model.sites import Group, Site, room_of
from lorafx.model.weight_formats import plain_tensors
from lorafx.model_passes import run_model_passes
from lorafx.pass_order import pipeline
from lorafx.passes.alias import Alias
from lorafx.passes.attach import allocate_groups
from lorafx.passes.select import Select
from lorafx.program.program import PassReport, Preparation
from lorafx.runtime.session import Session
from lorafx.torch_internals.shortcuts import states


def predicted(model: nn.Module, config: LoraConfig, options: Options) -> Explanation:
    """The report on a model that is not compiled. Raises TargetError as `lorafx.compile` does."""
    preparation = Preparation(model, config, options)
    prepared = run_model_passes(preparation, (Alias(), Select()))
    meta = [replace(site, device=torch.device("meta")) for site in preparation.sites]
    groups = allocate_groups(meta, config)
    return _model_report(model, config, options, preparation.sites, groups, prepared)


def explained(
    session: Session, calls: Sequence[object] = (), *, quick: bool = False
) -> Explanation:
    """The report on a marked model, with the kinds of its `calls`; `quick`: without fetching
    adapters or computing norms."""
    program, options = session.program, session.program.options
    if not quick:
        program.look_at_modules()
    report = _model_report(
        program.model, program.config, options, program.sites, program.groups, program.prepared
    )
    records = list(session.records)
    lora = [record for record in records if record.lora]
    unseen = [site.path for site in program.sites if site.path not in seen_sites(lora)]
    shortcuts = states(options.shortcuts).items()
    return replace(
        report,
        adapters=tuple(_adapter_report(session, name, quick) for name in session.store.names),
        shortcuts_off={name: state for name, state in shortcuts if state != "on"},
        graphs=tuple(map(graph_report, records)),
        unreached=tuple(unseen) if lora else (),
        replaced=tuple(program.site_watch.lines()),
        calls=tuple(map(str, calls)),
    )


def _model_report(
    model: nn.Module,
    config: LoraConfig,
    options: Options,
    sites: Sequence[Site],
    groups: Sequence[Group],
    prepared: Iterable[PassReport],
) -> Explanation:
    factors = (
        factor_elements(site.parts, config.max_rank) * group.bank.B.itemsize * site.experts
        for group in groups
        for site in group.sites
    )
    return Explanation(
        model=type(model).__name__,
        lowering=options.lowering,
        sites=tuple(map(_site_report, sites)),
        banks=tuple(BankReport(g.parent, g.members, g.bank.nbytes) for g in groups),
        slots=config.max_adapters,
        max_rank=config.max_rank,
        weight_bytes=sum(map(stored_bytes, model.parameters())),
        adapter_bytes=sum(factors),
        slot_rank=config.slot_rank,
        room=room_of(groups),
        passes=tuple(str(pipeline(options)).splitlines()),
        prepared=tuple(prepared),
    )


def stored_bytes(tensor: Tensor) -> int:
    """The bytes of a tensor; for a wrapper (a quantised weight) the sum of its parts' bytes."""
    return sum(part.nbytes for part in plain_tensors(tensor))


def _site_report(site: Site) -> SiteReport:
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
        own_rows=site.own_rows,
    )


def _adapter_report(session: Session, name: str, quick: bool) -> AdapterReport:
    store, merged = session.store, session.base.merged
    with nullcontext() if quick else store.fetch([name], resident=True):
        deltas = deltas_of(store[name], session.program.groups, quick=quick)
    return AdapterReport(
        **vars(info(store, name)),
        merged=merged is not None and merged.name == name,
        norms=None if deltas is None else deltas.norms,
        owned=store[name].owned,
        idle=() if deltas is None else tuple(deltas.idle),
        why_idle="" if deltas is None else deltas.why_idle,
    )


def graph_report(record: GraphRecord) -> GraphReport:
    nodes: dict[int, list[str]] = {}
    for state in record.states:
        nodes.setdefault(state.node_key, []).append(state.site.path)
    first = {state.node_key: state for state in reversed(record.states)}
    served = [text for aspect, text in record.form.items() if aspect != "adapters"]
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
                _with_sizes(first[key].rows, record.sizes),
            )
            for key, paths in nodes.items()
        ),
        refusals=tuple(record.checks.refusals),
        outlined=tuple(map(str, record.outlined)),
        saved=record.saved,
    )


def _with_sizes(text: str, sizes: Mapping[str, object]) -> str:
    return re.sub(r"\b[su][0-9]+\b", lambda match: str(sizes.get(match[0], match[0])), text)
