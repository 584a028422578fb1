"""Where the time of a call goes: the graphs' operators under torch.profiler, each by its site.

    served       the compiled model by the clock
    operators    the lowered graph, operator by operator: the same products and delta kernels

Inductor fuses what stands between, and on a CPU a product and its delta are one operator as served
(`join`), so times of single operators are of the second. A site's node is the delta's operator; the
product is what its y is made of.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch.profiler import ProfilerActivity, profile, record_function

from lorafx.capture.recorder import Stage
from lorafx.errors import BatchError, ConfigError
from lorafx.graph.expert_uses import is_grouped
from lorafx.kernels.cpu.dense import DENSE_ADDMM, DENSE_MM
from lorafx.model.sites import Site
from lorafx.op_arguments import AUTO_FUNCTIONALIZED, bound, op_of
from lorafx.passes.pack import ALIASES, VIEWS
from lorafx.reports.prediction import stored_bytes
from lorafx.reports.profile import Profile, ProfiledNode
from lorafx.serving.example_inputs import named_inputs
from lorafx.serving.replay import Replay, Staged, replayed
from lorafx.torch_internals.operators import HigherOrderOperator, OpOverload

aten = torch.ops.aten

_PRODUCTS = frozenset(
    {aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default}
    | {aten.convolution.default, aten.embedding.default, aten.linear.default}
    | {DENSE_MM, DENSE_ADDMM}
)
#: What a product's result goes through before the delta is added, and behind it.
_BETWEEN = ALIASES | VIEWS | {aten.cat.default, aten.clone.default}
_LABEL = "lorafx node "


@dataclass
class _Measured:
    """Seconds of the operators of one stage, by the name of their node, in all calls."""

    stage: Stage
    number: int
    seconds: dict[str, float] = field(default_factory=dict)
    runs: int = 0


def profiled(
    compiled: Staged,
    inputs: Mapping[str, Any] | Sequence[Any],
    names: Sequence[str | None],
    calls: int,
    serve: Callable[..., Any],
) -> Profile:
    """See `CompiledModel.profile`. `serve` makes the call, with arguments by name, as users do."""
    if not isinstance(calls, int) or calls < 1:
        raise ConfigError(f"calls = {calls!r}: at least one call is measured")
    named = named_inputs(compiled.entry(compiled.model).roles, inputs)
    adapters = [name for name in dict.fromkeys(names) if name not in (None, "__base__")]
    if not adapters:
        raise BatchError("no request of the batch has an adapter, so there is no delta to profile")
    served = _served(compiled, named, calls, serve)
    with replayed(compiled) as stages:
        stages.current = stages.apart
        graphs = _run(compiled, stages, named, names, calls)
        states = {state.site.path: state for record in stages.records for state in record.states}
        floors = _Floors(compiled, adapters)
        nodes: list[ProfiledNode] = []
        operators = 0.0
        for graph in graphs:
            operators += sum(graph.seconds.values())
            for paths, base, delta in _nodes_of(graph.stage):
                own = sum(graph.seconds.get(name, 0.0) for name in base)
                more = sum(graph.seconds.get(name, 0.0) for name in delta)
                state = states.get(paths[0])
                nodes.append(
                    ProfiledNode(
                        paths,
                        state.form if state else "",
                        state.strategy.partition(" (")[0] if state else "",  # without its floor
                        max(graph.runs // calls, 1),
                        own / calls if base else None,
                        more / calls if base else None,
                        (own + more) / calls,
                        floors.of(paths),
                    )
                )
    reached = {path for node in nodes for path in node.paths}
    sites = sum(node.whole for node in nodes)
    return Profile(
        type(compiled.model).__name__,
        _device(compiled),
        compiled._session.program.options.lowering,
        len(names),
        len(adapters),
        calls,
        served,
        operators / calls,
        operators / calls - sites,
        tuple(nodes),
        tuple(site.path for site in compiled.sites if site.path not in reached),
        tuple(_notes(nodes)),
    )


def _device(compiled: Staged) -> str:
    device = compiled._session.program.runtime.device
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _notes(nodes: Iterable[ProfiledNode]) -> Iterator[str]:
    nodes = list(nodes)
    if any(len(node.paths) > 1 for node in nodes):
        yield "siblings that one node computes have one time"
    if any(node.base is None for node in nodes):
        yield 'one operator does product and delta where these are "-"'
    yield "sites' times are of operators run one by one; as served, Inductor fuses those between"


def _served(
    compiled: Staged, inputs: Mapping[str, Any], calls: int, serve: Callable[..., Any]
) -> float:
    """Median seconds of a call, after one that compiles."""
    times = []
    for at in range(calls + 1):
        given = copy.deepcopy(dict(inputs))
        _wait(compiled)
        start = time.perf_counter()
        serve(**given)
        _wait(compiled)
        if at:
            times.append(time.perf_counter() - start)
    return statistics.median(times)


def _wait(compiled: Staged) -> None:
    device = compiled._session.program.runtime.device
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class _Labelled(fx.Interpreter):
    """Runs a graph with a label of the profiler's around each operator."""

    def __init__(self, gm: fx.GraphModule, number: int) -> None:
        super().__init__(gm)
        self.number = number

    def run_node(self, n: fx.Node) -> Any:
        if n.op != "call_function":
            return super().run_node(n)
        with record_function(f"{_LABEL}{self.number} {n.name}"):
            return super().run_node(n)


def _run(
    compiled: Staged,
    stages: Replay,
    inputs: Mapping[str, Any],
    names: Sequence[str | None],
    calls: int,
) -> list[_Measured]:
    graphs: dict[int, _Measured] = {}

    def call() -> None:
        compiled(**copy.deepcopy(dict(inputs)), adapter_names=list(names))

    def run(stage: Stage, given: Sequence[Any]) -> Any:
        own = graphs.setdefault(id(stage), _Measured(stage, len(graphs)))
        own.runs += 1
        return _Labelled(stage.graph, own.number).run(*given)

    call()  # captures
    device = compiled._session.program.runtime.device
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    stages.runner = run
    with profile(activities=activities, acc_events=True) as profiler:
        for _ in range(calls):
            call()
        _wait(compiled)
    by_number = {own.number: own for own in graphs.values()}
    for event in profiler.events() or ():
        if event.name.startswith(_LABEL):
            number, name = event.name.removeprefix(_LABEL).split(" ", 1)
            seconds = by_number[int(number)].seconds
            seconds[name] = seconds.get(name, 0.0) + _seconds(event, device.type == "cuda")
    return list(by_number.values())


def _seconds(event: Any, on_gpu: bool) -> float:
    """Of the operator under a label. An operator that writes is run on a copy here, which a
    compiled graph does not make, so only what it does itself counts."""
    children = list(event.cpu_children)
    own = [child for child in children if child.name.startswith("lorafx::")] or children
    if on_gpu:
        return sum(child.device_time_total for child in own or [event]) * 1e-6
    return sum(child.cpu_time_total for child in own) * 1e-6


def _nodes_of(stage: Stage) -> Iterator[tuple[tuple[str, ...], list[str], list[str]]]:
    """Of each site's node: the sites, the nodes of the base's product, those of the delta. No
    product where one node does both."""
    claimed: set[fx.Node] = set()
    for node in stage.graph.graph.nodes:
        paths = stage.paths(node)
        if not paths:
            continue
        base, delta = list[str](), list[str]()
        pending, seen = [node], {node}
        while pending:
            own = pending.pop()
            if own in claimed or own.op != "call_function":
                continue
            if _is_product(own):
                base.append(own.name)
            elif own.target in _BETWEEN or own.target is getattr:
                _follow(own.all_input_nodes, pending, seen)
                continue
            elif _is_lora(own):
                delta.append(own.name)
                _follow(_before(own), pending, seen)
            else:
                continue
            claimed.add(own)
        yield paths, base, delta


def _follow(sources: Iterable[fx.Node], pending: list[fx.Node], seen: set[fx.Node]) -> None:
    for source in sources:
        if source not in seen:
            seen.add(source)
            pending.append(source)


def _is_product(node: fx.Node) -> bool:
    return node.target in _PRODUCTS or is_grouped(node)


def _is_lora(node: fx.Node) -> bool:
    op = op_of(node)
    if isinstance(op, OpOverload):
        return op.namespace == "lorafx"
    return isinstance(op, HigherOrderOperator) and op is not AUTO_FUNCTIONALIZED


def _before(node: fx.Node) -> Iterable[fx.Node]:
    """What a delta is added to: y, which its operator takes first, or by that name. An operator
    that takes the weight makes y itself; launches of kernels do not say which of their arguments
    is what."""
    if not isinstance(op_of(node), OpOverload):
        return node.all_input_nodes
    call = bound(node)
    if "weight" in call:
        return ()
    y = call.get("y", next(iter(call.values())))
    return (y,) if isinstance(y, fx.Node) else ()


class _Floors:
    """Least traffic of sites with the adapters of a batch: 1 + bytes of A and B / bytes of W."""

    def __init__(self, compiled: Staged, adapters: Sequence[str]) -> None:
        session = compiled._session
        self.sites: dict[str, Site] = {site.path: site for site in compiled.sites}
        self.factors: dict[str, int] = {}
        for name in adapters:
            for index, factors in session.store.numbers(name).factors.items():
                group = session.program.groups[index]
                for own in factors:
                    path = group.site_of(own.sibling).path
                    size = own.A.nbytes + own.B.nbytes
                    self.factors[path] = self.factors.get(path, 0) + size

    def of(self, paths: Sequence[str]) -> float | None:
        sites = [self.sites[path] for path in paths]
        if any(site.eligible.kind == "embedding" for site in sites):
            return None
        held = [getattr(site.module, site.eligible.weight, None) for site in sites]
        weights = sum(stored_bytes(own) for own in held if isinstance(own, torch.Tensor))
        return 1 + sum(self.factors.get(path, 0) for path in paths) / weights if weights else None
