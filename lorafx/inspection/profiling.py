"""Measures a profile: the graphs' operators under torch.profiler, by site.

    served       the compiled model, wall time
    operators    the lowered graph, operator by operator: the same products and delta kernels

In served graphs Inductor fuses the operators between these, and on a CPU a product and its delta
are one operator (`join`), so the times of sites are measured in the second way. A site's node is
the operator of the delta; its product is found backwards from the operand y.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch.profiler import ProfilerActivity, record_function
from torch.profiler import profile as recorded_events

from lorafx.adapter_store.names import BASE
from lorafx.capture.record import Stage
from lorafx.errors import BatchError, ConfigError
from lorafx.inspection.explaining import stored_bytes
from lorafx.inspection.profile import Profile, ProfiledNode
from lorafx.kernels.cpu.weight_mm import WEIGHT_MM
from lorafx.model.sites import Site
from lorafx.op_arguments import AUTO_FUNCTIONALIZED, bound, op_of
from lorafx.passes.pack import ALIASES, VIEWS
from lorafx.program.weight_uses import is_grouped
from lorafx.runtime.example_inputs import named_inputs
from lorafx.runtime.forwards import CompiledForwards
from lorafx.runtime.replay import Replay, replayed
from lorafx.runtime.session import Session
from lorafx.torch_internals.graph_parts import HigherOrderOperator, OpOverload

aten = torch.ops.aten

_PRODUCTS = frozenset(
    {aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default}
    | {aten.convolution.default, aten.embedding.default, aten.linear.default}
    | {WEIGHT_MM}
)
#: Operators that may be between a product and its delta, or after the delta.
_BETWEEN = ALIASES | VIEWS | {aten.cat.default, aten.clone.default}
_LABEL = "lorafx node "


class _LabelledRun(fx.Interpreter):
    """Runs a stage with a label for the profiler around each operator.

    Attributes:
        seconds: name of a node -> the seconds of its operator in all calls.
    """

    def __init__(self, stage: Stage, number: int) -> None:
        super().__init__(stage.graph)
        self.stage = stage
        self.seconds: dict[str, float] = {}
        self.runs = 0
        self._label = f"{_LABEL}{number} "

    def run(self, *args: Any, **kwargs: Any) -> Any:
        self.runs += 1
        return super().run(*args, **kwargs)

    def run_node(self, n: fx.Node) -> Any:
        if n.op != "call_function":
            return super().run_node(n)
        with record_function(self._label + n.name):
            return super().run_node(n)

    def nodes(self, calls: int, floor_of: Callable[[Sequence[str]], float | None]) -> Nodes:
        """The node of each site, with the mean times of one call."""
        for node, base_names, delta_names in _site_nodes(self.stage):
            state, paths = self.stage.sites["", node.name][0], self.stage.paths(node)
            base = sum(self.seconds.get(name, 0.0) for name in base_names) / calls
            delta = sum(self.seconds.get(name, 0.0) for name in delta_names) / calls
            yield ProfiledNode(
                paths,
                state.form,
                state.strategy.partition(" (")[0],  # without its floor
                max(self.runs // calls, 1),
                base if base_names else None,
                delta if base_names else None,
                base + delta,
                floor_of(paths),
            )


Nodes = Iterator[ProfiledNode]
#: Makes a served call with these named arguments.
_Call = Callable[[Mapping[str, Any]], None]


def profiled(
    entries: CompiledForwards,
    serve: Callable[..., Any],
    inputs: Mapping[str, Any] | Sequence[Any],
    names: Sequence[str | None],
    calls: int,
) -> Profile:
    """The result of `CompiledModel.profile`. `serve` makes the calls."""
    if not isinstance(calls, int) or calls < 1:
        raise ConfigError(f"calls = {calls!r}: at least one call is measured")
    named = named_inputs(entries.of(entries.model).roles, inputs)
    adapters = [name for name in dict.fromkeys(names) if name not in (None, BASE)]
    if not adapters:
        raise BatchError("no request of the batch has an adapter, so there is no delta to profile")
    program = entries.session.program
    device = program.runtime.device

    def call(kwargs: Mapping[str, Any]) -> None:
        serve(**kwargs, adapter_names=list(names))

    entries.session.compile_for(lambda: call(copy.deepcopy(named)))
    tiers = entries.tiers
    before = tiers.eager_calls if tiers is not None else 0
    served = _time_served(call, named, device, calls)
    eager = tiers is not None and tiers.eager_calls > before
    with replayed(entries) as replay:
        graphs = _time_operators(call, named, replay, device, calls)
        floors = _Floors(entries.session, adapters)
        nodes = [node for graph in graphs for node in graph.nodes(calls, floors.of)]
    operators = sum(sum(graph.seconds.values()) for graph in graphs) / calls
    reached = {path for node in nodes for path in node.paths}
    return Profile(
        model=type(entries.model).__name__,
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        lowering=program.options.lowering,
        rows=len(names),
        adapters=len(adapters),
        calls=calls,
        served=served,
        way="eager" if eager else "compiled",
        operators=operators,
        others=operators - sum(node.whole for node in nodes),
        nodes=tuple(nodes),
        unreached=tuple(site.path for site in program.sites if site.path not in reached),
        notes=tuple(_notes(nodes)),
    )


def _notes(nodes: Sequence[ProfiledNode]) -> Iterator[str]:
    if any(len(node.paths) > 1 for node in nodes):
        yield "siblings that one node computes have one time"
    if any(node.base is None for node in nodes):
        yield 'one operator does product and delta where these are "-"'
    yield "sites' times are of operators run one by one; as served, Inductor fuses those between"


def _time_served(call: _Call, inputs: Mapping[str, Any], device: torch.device, calls: int) -> float:
    """Median seconds of a call."""
    times = []
    for _ in range(calls):
        kwargs = copy.deepcopy(inputs)
        _synchronize(device)
        start = time.perf_counter()
        call(kwargs)
        _synchronize(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _time_operators(
    call: _Call, inputs: Mapping[str, Any], replay: Replay, device: torch.device, calls: int
) -> list[_LabelledRun]:
    """The graphs of a call, run operator by operator under torch.profiler."""
    graphs: dict[Stage, _LabelledRun] = {}
    on_gpu = device.type == "cuda"

    def run(stage: Stage, values: Sequence[Any]) -> Any:
        return graphs.setdefault(stage, _LabelledRun(stage, len(graphs))).run(*values)

    call(copy.deepcopy(inputs))  # captures
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with (
        replay.running(replay.unjoined, run),
        recorded_events(activities=activities, acc_events=True) as profiler,
    ):
        for _ in range(calls):
            call(copy.deepcopy(inputs))
        _synchronize(device)
    runs = list(graphs.values())
    for event in profiler.events() or ():
        if event.name.startswith(_LABEL):
            number, name = event.name.removeprefix(_LABEL).split(" ", 1)
            seconds = runs[int(number)].seconds
            seconds[name] = seconds.get(name, 0.0) + _seconds(event, on_gpu)
    return runs


def _seconds(event: Any, on_gpu: bool) -> float:
    """The seconds of the operator under a label. Here an operator that writes gets a copy of its
    operand, which a compiled graph does not make: only the events of lorafx's operator count."""
    children = list(event.cpu_children)
    counted = [child for child in children if child.name.startswith("lorafx::")] or children
    if on_gpu:
        return sum(child.device_time_total for child in counted or [event]) * 1e-6
    return sum(child.cpu_time_total for child in counted) * 1e-6


def _site_nodes(stage: Stage) -> Iterator[tuple[fx.Node, list[str], list[str]]]:
    """Each site's node, with the names of the nodes that compute the base's product (none if one
    node computes both) and of those that compute the delta."""
    claimed: set[fx.Node] = set()
    for site in stage.graph.graph.nodes:
        if not stage.paths(site):
            continue
        base, delta = list[str](), list[str]()
        pending, seen = [site], {site}
        while pending:
            node = pending.pop()
            if node in claimed or node.op != "call_function":
                continue
            sources: Iterable[fx.Node] = ()
            if node.target in _BETWEEN or node.target is getattr:
                sources = node.all_input_nodes
            elif node.target in _PRODUCTS or is_grouped(node):
                base.append(node.name)
                claimed.add(node)
            elif _is_lora(node):
                delta.append(node.name)
                claimed.add(node)
                sources = _operands_with_y(node)
            pending += [source for source in sources if source not in seen]
            seen.update(sources)
        yield site, base, delta


def _is_lora(node: fx.Node) -> bool:
    op = op_of(node)
    if isinstance(op, OpOverload):
        return op.namespace == "lorafx"
    return isinstance(op, HigherOrderOperator) and op is not AUTO_FUNCTIONALIZED


def _operands_with_y(node: fx.Node) -> Sequence[fx.Node]:
    """The operand to which a delta is added: `y`, or the operator's first; nothing if the operator
    takes the weight and computes y itself; all operands of a launch, whose roles are unknown."""
    if not isinstance(op_of(node), OpOverload):
        return node.all_input_nodes
    call = bound(node)
    if "weight" in call:
        return ()
    y = call.get("y", next(iter(call.values())))
    return (y,) if isinstance(y, fx.Node) else ()


class _Floors:
    """Least traffic of sites with the adapters of a batch: 1 + bytes of A and B / bytes of W."""

    def __init__(self, session: Session, adapters: Sequence[str]) -> None:
        self.sites: dict[str, Site] = {site.path: site for site in session.program.sites}
        self.factors: dict[str, int] = {}
        for name in adapters:
            for index, factors in session.store[name].numbers.factors.items():
                group = session.program.groups[index]
                for part in factors:
                    path = group.site_of(part.sibling).path
                    size = part.A.nbytes + part.B.nbytes
                    self.factors[path] = self.factors.get(path, 0) + size

    def of(self, paths: Sequence[str]) -> float | None:
        sites = [self.sites[path] for path in paths]
        if any(site.eligible.kind == "embedding" for site in sites):
            return None
        weights = [getattr(site.module, site.eligible.weight, None) for site in sites]
        size = sum(stored_bytes(weight) for weight in weights if isinstance(weight, torch.Tensor))
        return 1 + sum(self.factors.get(path, 0) for path in paths) / size if size else None
