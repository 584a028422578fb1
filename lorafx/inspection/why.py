"""`why`: the fate of a module, and of an adapter's tensors for it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lorafx.adapter_store.names import BASE
from lorafx.config import LoraConfig
from lorafx.errors import ConfigError, nearest, some
from lorafx.inspection.delta_norms import deltas_of
from lorafx.inspection.explaining import graph_report
from lorafx.inspection.explanation import GraphReport
from lorafx.inspection.report import Report
from lorafx.model import targets
from lorafx.model.sites import Site
from lorafx.passes.select import left_out
from lorafx.program.argument_roles import RoleTable
from lorafx.program.program import Program
from lorafx.registry import lookup_class, own_entry
from lorafx.runtime.requests import Requests
from lorafx.runtime.session import Session


@dataclass(frozen=True)
class Selection:
    """The meaning of a path: the module, which for a parameter of routed experts is their module;
    the site, if it is one, and its `part`, None for all of it; and the rule that decided."""

    module: nn.Module
    path: str
    aliases: tuple[str, ...]
    site: Site | None
    part: int | None
    rule: str


def selection_of(program: Program, path: str) -> Selection:
    """The meaning of the path of a module, of a part of a packed module ("...self_attn.q_proj"), or
    of a parameter of routed experts. Raises ConfigError, with the nearest paths, for any other."""
    graph, config, sites = program.graph, program.config, program.sites
    for site in sites:
        if path in site.paths:
            return Selection(
                site.module, site.path, site.aliases, site, None, why_selected(config, site)
            )
    for site, part in _parts(sites):
        if path == site.part_path(part):
            rule = f"a part of {site.path}; {why_selected(config, site)}"
            return Selection(site.module, site.path, site.aliases, site, part, rule)
    module = graph.find(path)
    if module is None:
        paths = [known for known, _ in graph.modules() if known]
        paths += [site.part_path(part) for site, part in _parts(sites)]
        raise ConfigError(
            f"{type(graph.root).__qualname__} has no module {path!r}{nearest(path, paths)}"
        )
    first, *aliases = graph.paths(module)
    module_site = next((site for site in sites if site.module is module), None)
    if module_site is not None:  # `path` is an unlisted alias, or the module of routed experts
        rule = why_selected(config, module_site)
    else:
        rule = left_out(graph, config, module)
        below = [site.path for site in sites if not first or site.path.startswith(f"{first}.")]
        if below:
            rule += f". Sites below it: {some(below)}"
    return Selection(module, first, tuple(aliases), module_site, None, rule)


def _parts(sites: Sequence[Site]) -> Iterator[tuple[Site, int]]:
    return (
        (site, part) for site in sites if len(site.parts) > 1 for part in range(len(site.parts))
    )


def why_selected(config: LoraConfig, site: Site) -> str:
    """The rules of configuration and registry that select a site."""
    return f"{_why_targeted(config, site)}; {registered(type(site.module))}"


def registered(cls: type) -> str:
    """A sentence with the registered base class of a class, and the MRO up to it."""
    entry = lookup_class(cls)
    if entry is None:
        return f"no class of the MRO of {cls.__qualname__} is registered"
    mro = [base.__name__ for base in cls.__mro__]
    steps = next(i for i, base in enumerate(cls.__mro__) if own_entry(base) is not None)
    if not steps:
        return f"{cls.__name__} is registered itself"
    return f"{mro[steps]} is registered, in the MRO {' > '.join(mro[: steps + 1])}"


def _why_targeted(config: LoraConfig, site: Site) -> str:
    target = targets.checked(config.target_modules, "target_modules")
    if target is None:
        return "no target_modules are given, which means all linear layers"
    if targets.is_all_linear(target):
        return "target_modules='all-linear' means all linear layers"
    names = [name for path in site.paths for name in (path, path.rpartition(".")[0])]
    names += [site.part_path(part) for part in range(len(site.parts))]
    names += [
        f"{path.rpartition('.')[0]}.{packed.name}"
        for packed in site.member_of
        for path in site.paths
    ]
    if isinstance(target, str):
        if targets.names(target, names):
            return f"target_modules={target!r:.80} matches its path"
    else:
        entries = [entry for entry in target if targets.names(targets.Entries([entry]), names)]
        if entries:
            saved = isinstance(target, targets.SavedTargets)
            source = "the adapters' own names have" if saved else "target_modules has"
            return f"{source} {', '.join(map(repr, entries[:3]))}"
    if site.own_rows:
        return "modules_to_save or trainable_tokens name it"
    return "a module that carries it is among target_modules"


#: The positional and keyword arguments of a call.
Arguments = tuple[Sequence[Any], Mapping[str, Any]]


@dataclass(frozen=True)
class WhyAdapter:
    """An adapter's effect on the module.

    Attributes:
        norm: the Frobenius norm of ΔW = s·B A, if known; `relative_norm` is relative to W's.
        change: the relative norm of the change of the module's output for the given inputs.
        notes: why it has no effect, or was not measured.
    """

    name: str
    source: str
    norm: float | None = None
    relative_norm: float | None = None
    change: float | None = None
    notes: tuple[str, ...] = ()

    def lines(self) -> list[str]:
        lines = [f"adapter {self.name!r} from {self.source}:"]
        if self.norm is not None:
            relative = self.relative_norm
            of_weight = "" if relative is None else f", {relative:.3g} of that of W"
            lines.append(f"  norm of ΔW {self.norm:.3g}{of_weight}")
        if self.change is not None:
            lines.append(f"  changes its output by {self.change:.3g} (relative norm)")
        return lines + [f"  {note}" for note in self.notes]


@dataclass(frozen=True)
class Why(Report):
    """The fate of a module.

    Attributes:
        asked: the path that was passed to `why`.
        selected: whether the module carries LoRA.
        rule: why, or why not: class hierarchy, target_modules, registry.
        sizes: "24 -> 40, float32" of a site.
        beside: the other sites in its bank.
        adapters: the loaded adapters that have factors for it.
        graphs: the graphs, with only those nodes and refusals that concern the module.
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
    graphs: tuple[GraphReport, ...] = ()

    @property
    def heading(self) -> str:
        state = f"a site, {self.sizes}" if self.selected else "carries no LoRA"
        return f"{self.path or '(root)'}: {self.cls}, {state}"

    def facts(self) -> list[str]:
        lines = [f"{'selected' if self.selected else 'not selected'}: {self.rule}"]
        lines += [f"asked for as {self.asked}"] if self.asked != self.path else []
        lines += [f"also {', '.join(self.aliases)}"] if self.aliases else []
        lines += [f"shares its bank with {', '.join(self.beside)}"] if self.beside else []
        lines += [f"adapters that reach it: {', '.join(self.adapters)}"] if self.adapters else []
        lines += [] if self.adapter is None else self.adapter.lines()
        return lines + [line for graph in self.graphs for line in _graph_lines(graph, self.path)]


def _graph_lines(graph: GraphReport, path: str) -> list[str]:
    if not graph.lora:
        return [f"{graph.title}: for calls without adapters"]
    lines = []
    for node in graph.nodes:
        siblings = [site for site in node.sites if site != path]
        form = f"{node.form} with {', '.join(siblings)}" if siblings else node.form
        lines.append(f"{graph.title}: {form}; {node.strategy}; {node.rows}")
    lines += [f"{graph.title}: refused ({item.when}): {item.reason}" for item in graph.refusals]
    return lines or [f"{graph.title}: does not reach it"]


def why(session: Session, path: str, adapter: str | None, call: Arguments | None) -> Why:
    """The fate of the module at `path`, and the effect of `adapter`, measured by `call`. Raises
    ConfigError if there is no such module, UnknownAdapterError, and the errors of `call`."""
    program, store = session.program, session.store
    program.look_at_modules()
    selection = selection_of(program, path)
    effect = None
    if adapter is not None:
        if adapter == BASE:
            raise ConfigError(f"{BASE!r} is the base model, which has nothing for any module")
        store.check_known(adapter)
        effect = _effect(session, selection, adapter, call)
    site, cls = selection.site, type(selection.module)
    report = Why(
        asked=path,
        path=selection.path,
        aliases=selection.aliases,
        cls=cls.__name__,
        selected=site is not None,
        rule=selection.rule if site is not None else f"{selection.rule}; {registered(cls)}",
        adapter=effect,
    )
    if site is None:
        return report
    part = site if selection.part is None else site.parts[selection.part]
    group, _ = program.home(site)
    graphs = (
        replace(
            graph,
            nodes=tuple(node for node in graph.nodes if site.path in node.sites),
            refusals=tuple(item for item in graph.refusals if site.path in item.sites),
        )
        for graph in map(graph_report, session.records)
    )
    return replace(
        report,
        sizes=f"{part.in_features} -> {part.out_features}, {site.dtype_name}",
        beside=tuple(other.path for other in group.sites if other is not site),
        adapters=tuple(name for name in store.names if site.path in store[name].sites),
        graphs=tuple(graphs),
    )


def _effect(
    session: Session, selection: Selection, name: str, call: Arguments | None
) -> WhyAdapter:
    program, stored, site = session.program, session.store[name], selection.site
    if site is None or site.path not in stored.sites:
        near = nearest(selection.path, stored.sites)
        return WhyAdapter(name, stored.source, notes=(f"it has nothing for this module{near}",))
    norm, notes = None, list[str]()
    deltas = deltas_of(stored, program.groups)
    if deltas is not None:
        norm = deltas.norms.get(site.path)
        if site.path in deltas.idle:
            notes.append(f"no effect, because {deltas.idle[site.path]}")
    if site.path in stored.owned:
        notes.append("it has a weight of its own here, of which norms of ΔW say nothing")
    change = None if call is None else _change_of(session, site, name, call)
    if call is None:
        notes.append("why(..., inputs={...}) also measures its change of the output")
    elif change is None:
        notes.append("its change was not measured: the model does not call this module")
    relative = _relative_norm(norm, program.weight_of(site))
    return WhyAdapter(name, stored.source, norm, relative, change, tuple(notes))


def _relative_norm(norm: float | None, weight: Tensor | None) -> float | None:
    if norm is None or weight is None or not weight.is_floating_point() or weight.is_meta:
        return None
    weight_norm = float(weight.detach().float().norm())
    return norm / weight_norm if weight_norm else None


def _change_of(session: Session, site: Site, name: str, call: Arguments) -> float | None:
    """‖(y + delta) − y‖ / ‖y‖ of the site's module, with its outputs before and after its mark, in
    an eager run with adapter `name` for all requests; None if the model does not call the module.
    Raises LorafxError, or the model's errors."""
    delta_square = y_square = 0.0
    outputs: list[Tensor] = []

    def before_mark(module: nn.Module, args: Any, output: Any) -> None:
        outputs.append(_tensor(output).detach().clone())

    def after_mark(module: nn.Module, args: Any, output: Any) -> None:
        nonlocal delta_square, y_square
        y = outputs.pop().double()
        delta_square += float((_tensor(output).double() - y).square().sum())
        y_square += float(y.square().sum())

    hooks = [
        site.marked.register_forward_hook(before_mark, prepend=True),
        site.marked.register_forward_hook(after_mark),
    ]
    try:
        _run_eagerly(session, name, *call)
    finally:
        for hook in hooks:
            hook.remove()
    return (delta_square / y_square) ** 0.5 if y_square else None


def _run_eagerly(
    session: Session, name: str, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> None:
    model, row_dims = session.program.model, session.program.config.row_dims
    roles = RoleTable(model, row_dims)
    named = roles.spread(roles.bind(tuple(args), kwargs))

    def serve() -> None:
        session.set_batch(roles, named)
        with torch.no_grad(), session.without_mha_fast_path():
            model.forward(*args, **kwargs)

    def run() -> None:
        session.run(session.running.in_forward(session.program.runtime.rows), serve)

    session.call(lambda: run, Requests((name,), uniform=True))


def _tensor(output: Any) -> Tensor:
    value = output[0] if isinstance(output, (tuple, list)) and output else output
    if not isinstance(value, Tensor):
        raise ConfigError(f"the module returns a {type(output).__name__}, not a tensor")
    return value
