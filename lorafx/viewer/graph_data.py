"""What the page shows of a graph, of JSON's own types. `page/model.js` reads it.

A node that several stages share is written once: a stage has the numbers of its nodes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_aggregate
from torch.utils.flop_counter import flop_registry

from lorafx.capture.graph_text import Printer, path_of, users_line, value_of, value_text
from lorafx.capture.node_names import names_of
from lorafx.capture.record import GraphRecord
from lorafx.capture.recorder import Place, Stage
from lorafx.graph.context import Refusal, SiteState
from lorafx.passes.outline.outline import INVOKE
from lorafx.passes.outline.regions import is_view
from lorafx.program.frame import FrameInput
from lorafx.program.program import Program
from lorafx.torch_internals.compat import size_hint
from lorafx.viewer.dump import sources_of

_NODE = (
    *("name", "line", "inputs", "op", "target", "value", "path", "cls", "source", "code", "kind"),
    *("sizes", "itemsize", "free", "flops"),
)
_SITE = ("path", "cls", "k", "n", "rank", "flops", "rows", "form", "strategy")
_REFUSAL = ("paths", "when", "reason")


class _Table:
    """Rows by number, each once."""

    def __init__(self, fields: tuple[str, ...]) -> None:
        self._fields = fields
        self._numbers: dict[tuple[Any, ...], int] = {}

    def number(self, *row: Any) -> int:
        return self._numbers.setdefault(row, len(self._numbers))

    @property
    def rows(self) -> list[dict[str, Any]]:
        return [dict(zip(self._fields, row, strict=True)) for row in self._numbers]


def graph_data(record: GraphRecord, program: Program) -> dict[str, Any]:
    """All of one graph of a program.

    Of a node: `inputs` names of those that it reads; `path`, `cls` of the module that made it;
    `source`, `code` the line of the user's code; `kind` of an input; `sizes` the shape in the
    numbers of the capture; `free` where it moves no memory; `flops` of a product or an attention.
    Of a site: `k`, `n` sizes of the delta, `rank` the room of a slot, `flops` at that rank.
    """
    nodes, sites, refusals = _Table(_NODE), _Table(_SITE), _Table(_REFUSAL)
    names = names_of(record.stages, record.sizes)
    calls = {item.name: item.paths for item in record.outlined}
    facts = [f"outline: {item}" for item in record.outlined]
    return {
        "title": record.title,
        "reason": record.reason,
        "facts": facts + [record.saved] * bool(record.saved),
        "sources": sources_of(record),
        "seconds": record.seconds,
        "stages": [
            _stage(stage, names, calls, program, nodes, sites, refusals) for stage in record.stages
        ],
        "nodes": nodes.rows,
        "sites": sites.rows,
        "refusals": refusals.rows,
    }


def _stage(
    stage: Stage,
    names: Mapping[Place, str],
    calls: Mapping[Any, tuple[str, ...]],
    program: Program,
    nodes: _Table,
    sites: _Table,
    refusals: _Table,
) -> dict[str, Any]:
    paths = {name: iter(found) for name, found in calls.items()}
    graphs, served = [], []
    for path, graph in stage.graphs.items():
        printer, numbers = Printer(path, names), []
        for node in graph.nodes:
            called = next(paths.get(node.args[1], iter(())), "") if node.target is INVOKE else ""
            number = nodes.number(*_node(stage, (path, node.name), node, printer, called))
            numbers.append(number)
            states = stage.sites.get((path, node.name))
            if states:
                sizes = _sizes(value_of(node))
                found = (_site(state, sizes, program) for state in states)
                served.append([number, [sites.number(*row) for row in found]])
        graphs.append([path, numbers])
    return {
        "name": stage.name,
        "edits": None if stage.report is None else stage.report.edits,
        "seconds": 0.0 if stage.report is None else round(stage.report.seconds, 6),
        "graphs": graphs,
        "sites": served,
        "refusals": [refusals.number(*_refusal(item)) for item in stage.refusals],
    }


def _node(
    stage: Stage, place: Place, node: fx.Node, printer: Printer, called: str
) -> tuple[Any, ...]:
    item = None if place[0] else stage.inputs.get(node.name)
    path, cls = called or path_of(stage, place, node), _class_of(node)
    if item is not None:
        path, cls = _module_of(item)
    elif not cls and place in stage.sites:
        cls = type(stage.sites[place][0].site.module).__qualname__
    target: Any = node.target
    value = value_of(node)
    return (
        node.name if node.op == "output" else printer.name(node),
        printer.line(node),
        tuple(map(printer.name, node.all_input_nodes)),
        node.op,
        printer.text(target) if node.op == "call_function" else str(target),
        value_text(node),
        path,
        cls,
        *users_line(str(node.meta.get("stack_trace") or "")),
        "" if item is None else item.kind,
        _sizes(value),
        value.dtype.itemsize if isinstance(value, Tensor) else 0,
        node.op in ("placeholder", "get_attr", "output") or is_view(node),
        _flops(node),
    )


def _module_of(item: FrameInput) -> tuple[str, str]:
    """Path and class of the module whose tensor an input is."""
    sites = item.group.sites if item.group is not None else item.sites
    if sites:
        return sites[0].path, type(sites[0].module).__qualname__
    return (item.holder.path, "") if item.holder is not None else ("", "")


def _class_of(node: fx.Node) -> str:
    stack = node.meta.get("nn_module_stack") or {}
    for _, cls in reversed(list(stack.values())):
        return cls.__qualname__ if isinstance(cls, type) else str(cls).rpartition(".")[2]
    return ""


def _site(state: SiteState, sizes: tuple[int, ...], program: Program) -> tuple[Any, ...]:
    site = state.site
    rank = program.home(site)[0].bank.slot_rank
    read = {"linear": site.in_features * len(site.parts), "embedding": 0}.get(site.eligible.kind)
    flops = 0
    if sizes and read is not None:  # x Aᵀ for each part, and the sum with B
        flops = 2 * math.prod(sizes[:-1]) * rank * (read + site.out_features)
    return (
        *(site.path, type(site.module).__qualname__, site.in_features, site.out_features),
        *(rank, flops, state.rows, state.form, state.strategy),
    )


def _refusal(item: Refusal) -> tuple[Any, ...]:
    return item.paths, item.when, item.reason


def _sizes(value: Any) -> tuple[int, ...]:
    """The shape of a tensor in numbers; () where one of them depends on data."""
    hints = tuple(map(size_hint, value.shape)) if isinstance(value, Tensor) else ()
    return tuple(size for size in hints if size is not None) if None not in hints else ()


def _flops(node: fx.Node) -> int:
    """torch's own count (`torch.utils.flop_counter`), where it has one for the operator.

    The formula is given shapes in numbers: to compare symbols would put guards on the graph.
    """
    formula = flop_registry.get(getattr(node.target, "overloadpacket", None))
    if formula is None:
        return 0

    def shape(item: Any) -> Any:
        if not isinstance(item, fx.Node):
            return item
        sizes = _sizes(value_of(item))
        if not sizes:
            raise ValueError("no tensor, or one of sizes that depend on data")
        return torch.Size(sizes)

    try:
        args, kwargs = map_aggregate((node.args, node.kwargs), shape)
        return int(formula(*args, **kwargs, out_val=torch.Size(_sizes(value_of(node)))))
    except Exception:  # also a form of the operator that torch cannot count: nothing depends on it
        return 0
