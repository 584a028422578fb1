"""`why`: what became of one module, and of what an adapter has for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

from torch import Size, Tensor, nn

from lorafx.adapter_store.checkpoint import load_state
from lorafx.adapter_store.names import BASE
from lorafx.adapter_store.peft_keys import parse
from lorafx.adapter_store.places import ExpertPlace, Places, SavedMeaning, SiteLanding
from lorafx.config import LoraConfig
from lorafx.errors import ConfigError, LorafxError, nearest
from lorafx.explanation.collecting import graph_report
from lorafx.explanation.delta_norms import deltas_of
from lorafx.explanation.measured_changes import Serve, change_of
from lorafx.explanation.report import NodeReport, RefusalReport
from lorafx.explanation.selection import Selection, registered, selection_of
from lorafx.model.module_graph import ModuleGraph
from lorafx.model.sites import Site
from lorafx.reports.writing import json_values
from lorafx.session.requests import LastCall
from lorafx.session.session import Session


class Landed(NamedTuple):
    """The keys of an adapter for one module, in PEFT's names with their shapes, and a note where
    there are none."""

    keys: tuple[str, ...]
    note: str = ""


def landed(
    saved: Mapping[str, Size], model: nn.Module, sites: tuple[Site, ...], found: Selection
) -> Landed:
    """Those of the keys of an adapter, in PEFT's names, that are for what was found."""
    places = Places(sites, model)
    keys: list[str] = []
    modules: dict[str, None] = {}
    for key, shape in saved.items():
        factor = parse(key)
        path = key.rpartition(".")[0] if factor is None else factor.module
        modules[places.current(path)] = None
        if _means(places.meaning(path), found):
            keys.append(f"{key} {tuple(shape)}")
    if keys:
        return Landed(tuple(keys))
    near = nearest(found.path, modules)
    return Landed((), f"none of its {len(saved)} keys is for this module{near}")


def _means(meaning: SavedMeaning, found: Selection) -> bool:
    if isinstance(meaning, SiteLanding):
        return any(
            site is found.site and found.part in (None, part) for site, part in meaning.places
        )
    if isinstance(meaning, ExpertPlace):
        if meaning.experts.module is not found.module:
            return False
        site = found.site
        one = meaning.weight if site is not None else None
        return one is None or site is None or site.expert_weight == one
    return meaning is found.module


@dataclass(frozen=True)
class InGraph:
    """What one graph does for the module.

    Attributes:
        title: the graph's.
        nodes: those that add its delta, with the sites that they serve besides.
        refusals: why the graph cannot serve it, and for which batches.
        lora: whether the graph is one of calls with adapters.
    """

    title: str
    nodes: tuple[NodeReport, ...]
    refusals: tuple[RefusalReport, ...]
    lora: bool


@dataclass(frozen=True)
class WhyAdapter:
    """What an adapter has for the module.

    Attributes:
        name, source: the adapter's.
        keys: those of its keys that are for the module, with their shapes.
        norm: the Frobenius norm of ΔW = s·B A; None where it is not known.
        relative_norm: the same over the norm of W.
        change: by how much it changes what the module returns, as a relative norm.
        batch: the inputs that `change` was measured with: "the last batch", "the given inputs".
        notes: what is to be said besides: why it has no effect, what could not be measured.
    """

    name: str
    source: str
    keys: tuple[str, ...] = ()
    norm: float | None = None
    relative_norm: float | None = None
    change: float | None = None
    batch: str = ""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Why:
    """What became of one module.

    Attributes:
        asked: the path that was asked for.
        path, aliases: the module's canonical path, and the others that reach it.
        cls: its class.
        selected: whether it carries LoRA.
        rule: why, or why not: class hierarchy, target_modules, registry.
        sizes: "24 -> 40, float32" of a site.
        beside: the sites that share its bank.
        adapters: the loaded adapters that reach it.
        adapter: of the adapter that was asked for.
        graphs: what each graph does for it.
    """

    asked: str
    path: str
    aliases: tuple[str, ...]
    cls: str
    selected: bool
    rule: str
    sizes: str = ""
    beside: tuple[str, ...] = ()
    adapters: tuple[str, ...] = ()
    adapter: WhyAdapter | None = None
    graphs: tuple[InGraph, ...] = ()

    def json(self) -> dict[str, Any]:
        """The fields, of JSON's own types; null for what is no finite number."""
        found: dict[str, Any] = json_values(asdict(self))
        return found

    def __str__(self) -> str:
        return "\n  ".join(_lines(self))


def why(
    session: Session,
    path: str,
    adapter: str | None,
    call: tuple[Sequence[Any], Mapping[str, Any]] | None,
    last: LastCall | None,
    serve: Serve,
) -> Why:
    """What became of the module at `path` in a marked model.

    Args:
        call: arguments to measure with; None for those of the `last` one.
        serve: measures.

    Raises:
        ConfigError: there is no such module.
        UnknownAdapterError: the adapter is not loaded.
        With `call`, whatever that raises.
    """
    program, store = session.program, session.store
    program.look_at_modules()
    found = selection_of(program.graph, program.config, program.sites, path)
    made = _described(path, found)
    if adapter is not None:
        if adapter == BASE:
            raise ConfigError(f"{BASE!r} is the base model, which has nothing for any module")
        store.check_known(adapter)
        made = replace(made, adapter=_adapter(session, found, adapter, call, last, serve))
    site = found.site
    if site is None:
        return made
    group, _ = program.home(site)
    reached = tuple(name for name in store.names if site.path in store[name].sites)
    reports = map(graph_report, session.backend.records)
    graphs = [
        InGraph(
            graph.title,
            tuple(node for node in graph.nodes if site.path in node.sites),
            tuple(item for item in graph.refusals if site.path in item.sites),
            graph.lora,
        )
        for graph in reports
    ]
    beside = tuple(other.path for other in group.sites if other is not site)
    return replace(made, beside=beside, adapters=reached, graphs=tuple(graphs))


def why_before(
    model: nn.Module,
    config: LoraConfig,
    sites: tuple[Site, ...],
    path: str,
    adapters: Mapping[str, Any],
) -> list[Why]:
    """As `why` of a model that was not compiled: of each adapter, or of the module alone.

    Raises:
        ConfigError: there is no such module.
        CheckpointError, UnsupportedAdapterError: an adapter cannot be read.
    """
    found = selection_of(ModuleGraph(model), config, sites, path)
    made = _described(path, found)
    told = []
    for name, source in adapters.items():
        keys, note = landed(_keys_at(source, model), model, sites, found)
        notes = (note,) if note else ()
        told.append(replace(made, adapter=WhyAdapter(name, str(source), keys, notes=notes)))
    return told or [made]


def _described(asked: str, found: Selection) -> Why:
    site = found.site
    sizes = ""
    if site is not None:
        part = site if found.part is None else site.parts[found.part]
        sizes = f"{part.in_features} -> {part.out_features}, {site.dtype_name}"
    return Why(
        asked=asked,
        path=found.path,
        aliases=found.aliases,
        cls=type(found.module).__name__,
        selected=site is not None,
        rule=found.rule if site is not None else f"{found.rule}; {registered(type(found.module))}",
        sizes=sizes,
    )


def _adapter(
    session: Session,
    found: Selection,
    name: str,
    call: tuple[Sequence[Any], Mapping[str, Any]] | None,
    last: LastCall | None,
    serve: Serve,
) -> WhyAdapter:
    program, stored, site = session.program, session.store[name], found.site
    keys, notes = Landed(()), []
    try:
        origin, model = stored.origin, program.model
        saved = stored.keys if origin is None else _keys_at(origin.source, model)
        keys = landed(saved, model, program.sites, found)
    except LorafxError as error:  # its files have changed
        notes.append(f"its keys cannot be read: {error}")
    notes += [keys.note] if keys.note else []
    made = WhyAdapter(name, stored.source, keys.keys)
    if site is None or site.path not in stored.sites:
        return replace(made, notes=tuple(notes))
    deltas = deltas_of(stored, program.groups)
    if deltas is not None:
        norm = deltas.norms.get(site.path)
        made = replace(made, norm=norm, relative_norm=_relative(norm, program.weight_of(site)))
        if site.path in deltas.idle:
            notes.append(f"no effect, because {deltas.idle[site.path]}")
    arguments = call
    if arguments is None and last is not None:
        arguments = last.arguments()
    if arguments is None:
        notes.append(
            "its change was not measured: the last batch is gone, or there was none; "
            "why(..., inputs={...}) measures it"
        )
        return replace(made, notes=tuple(notes))
    try:
        change = change_of(serve, site, name, *arguments)
    except LorafxError as error:
        if call is not None:
            raise
        change = None
        notes.append(f"its change was not measured: {error}")
    else:
        if change is None:
            notes.append("its change was not measured: the model does not call this module")
    batch = "" if change is None else "the last batch" if call is None else "the given inputs"
    return replace(made, change=change, batch=batch, notes=tuple(notes))


def _keys_at(source: Any, model: nn.Module) -> dict[str, Size]:
    """The keys of an adapter's file, with shapes. Raises as `load_state`."""
    state = load_state(source, model, warn=False)
    return {key: tensor.shape for key, tensor in state.tensors.items()}


def _relative(norm: float | None, weight: Tensor | None) -> float | None:
    if norm is None or weight is None or not weight.is_floating_point() or weight.is_meta:
        return None
    whole = float(weight.detach().float().norm())
    return norm / whole if whole else None


def _lines(why: Why) -> list[str]:
    state = f"a site, {why.sizes}" if why.selected else "carries no LoRA"
    lines = [f"{why.path or '(root)'}: {why.cls}, {state}"]
    lines.append(f"{'selected' if why.selected else 'not selected'}: {why.rule}")
    if why.asked != why.path:
        lines.append(f"asked for as {why.asked}")
    if why.aliases:
        lines.append(f"also {', '.join(why.aliases)}")
    if why.beside:
        lines.append(f"shares its bank with {', '.join(why.beside)}")
    if why.adapters:
        lines.append(f"adapters that reach it: {', '.join(why.adapters)}")
    if why.adapter is not None:
        lines += _adapter_lines(why.adapter)
    for graph in why.graphs:
        lines += _graph_lines(graph, why.path)
    return lines


def _adapter_lines(adapter: WhyAdapter) -> list[str]:
    lines = [f"adapter {adapter.name!r} from {adapter.source}:"]
    lines += [f"  key {key}" for key in adapter.keys]
    if adapter.norm is not None:
        relative = adapter.relative_norm
        of_weight = "" if relative is None else f", {relative:.3g} of that of W"
        lines.append(f"  norm of ΔW {adapter.norm:.3g}{of_weight}")
    if adapter.change is not None:
        lines.append(
            f"  changes its output by {adapter.change:.3g} (relative norm, {adapter.batch})"
        )
    return lines + [f"  {note}" for note in adapter.notes]


def _graph_lines(graph: InGraph, path: str) -> list[str]:
    if not graph.lora:
        return [f"{graph.title}: for calls without adapters"]
    lines = []
    for node in graph.nodes:
        others = [other for other in node.sites if other != path]
        form = f"{node.form} with {', '.join(others)}" if others else node.form
        lines.append(f"{graph.title}: {form}; {node.strategy}; {node.rows}")
    lines += [f"{graph.title}: refused ({item.when}): {item.reason}" for item in graph.refusals]
    return lines or [f"{graph.title}: does not reach it"]
