"""The page's data of a graph, in JSON types, read by `page/model.js`.

Nodes shared by several stages are written once: stages refer to them by number.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_aggregate
from torch.utils.flop_counter import flop_registry

from lorafx.capture.graph_text import Printer, path_of, users_line, value_of, value_text
from lorafx.capture.node_names import names_of
from lorafx.capture.record import GraphRecord
from lorafx.capture.recorder import Place, Stage
from lorafx.graph.context import SiteState
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
    """Distinct rows by number."""

    def __init__(self, fields: tuple[str, ...]) -> None:
        self._fields = fields
        self._numbers: dict[tuple[Any, ...], int] = {}

    def number(self, *row: Any) -> int:
        return self._numbers.setdefault(row, len(self._numbers))

    @property
    def rows(self) -> list[dict[str, Any]]:
        return [dict(zip(self._fields, row, strict=True)) for row in self._numbers]


def graph_data(record: GraphRecord, program: Program) -> dict[str, Any]:
    """All data of a graph.

    Node: `inputs` names of operands; `path`, `cls` its module; `source`, `code` the user's line;
    `kind` of an input; `sizes` the captured shape; `free` if it moves no memory; `flops` of
    products and attentions. Site: `k`, `n` sizes of the delta, `rank` of a slot, `flops` at that
    rank.
    """
    encoder = _Encoder(record, program)
    facts = [f"outline: {item}" for item in record.outlined]
    return {
        "title": record.title,
        "reason": record.reason,
        "facts": facts + [record.saved] * bool(record.saved),
        "sources": sources_of(record),
        "seconds": record.seconds,
        "stages": list(map(encoder.stage, record.stages)),
        "nodes": encoder.nodes.rows,
        "sites": encoder.sites.rows,
        "refusals": encoder.refusals.rows,
    }


class _Encoder:
    def __init__(self, record: GraphRecord, program: Program) -> None:
        self.nodes, self.sites, self.refusals = _Table(_NODE), _Table(_SITE), _Table(_REFUSAL)
        self._names = names_of(record.stages, record.sizes)
        self._outlined = record.outlined
        self._program = program

    def stage(self, stage: Stage) -> dict[str, Any]:
        calls: dict[Any, Iterator[str]] = {item.name: iter(item.paths) for item in self._outlined}
        graphs, served = [], []
        for path, graph in stage.graphs.items():
            printer, numbers = Printer(path, self._names), []
            for node in graph.nodes:
                called = ""
                if node.target is INVOKE and node.args[1] in calls:
                    called = next(calls[node.args[1]], "")
                place = path, node.name
                number = self.nodes.number(*_node(stage, place, node, printer, called))
                numbers.append(number)
                if place in stage.sites:
                    sizes = _sizes(value_of(node))
                    found = (self._site(state, sizes) for state in stage.sites[place])
                    served.append([number, [self.sites.number(*row) for row in found]])
            graphs.append([path, numbers])
        refused = ((item.paths, item.when, item.reason) for item in stage.refusals)
        return {
            "name": stage.name,
            "edits": None if stage.report is None else stage.report.edits,
            "seconds": 0.0 if stage.report is None else round(stage.report.seconds, 6),
            "graphs": graphs,
            "sites": served,
            "refusals": [self.refusals.number(*row) for row in refused],
        }

    def _site(self, state: SiteState, sizes: tuple[int, ...]) -> tuple[Any, ...]:
        site = state.site
        rank = self._program.home(site)[0].bank.slot_rank
        read = {"linear": site.in_features * len(site.parts), "embedding": 0}.get(
            site.eligible.kind
        )
        flops = 0
        if sizes and read is not None:  # x Aᵀ for each part, and the sum with B
            flops = 2 * math.prod(sizes[:-1]) * rank * (read + site.out_features)
        return (
            *(site.path, type(site.module).__qualname__, site.in_features, site.out_features),
            *(rank, flops, state.rows, state.form, state.strategy),
        )


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
    sites = item.group.sites if item.group is not None else item.sites
    if sites:
        return sites[0].path, type(sites[0].module).__qualname__
    return (item.holder.path, "") if item.holder is not None else ("", "")


def _class_of(node: fx.Node) -> str:
    stack = node.meta.get("nn_module_stack") or {}
    for _, cls in reversed(list(stack.values())):
        return cls.__qualname__ if isinstance(cls, type) else str(cls).rpartition(".")[2]
    return ""


def _sizes(value: Any) -> tuple[int, ...]:
    """A tensor's shape in numbers; () where a size depends on data."""
    hints = tuple(map(size_hint, value.shape)) if isinstance(value, Tensor) else ()
    return tuple(size for size in hints if size is not None) if None not in hints else ()


def _flops(node: fx.Node) -> int:
    """torch's count (`torch.utils.flop_counter`) from numbers: symbols would add guards."""
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
