"""The page's data of a graph, in JSON types, read by `page/app.js`.

Nodes shared by several stages are written once: stages refer to them by number.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_aggregate
from torch.utils.flop_counter import flop_registry

from lorafx.capture.graph_text import Printer, path_of, users_line, value_of, value_text
from lorafx.capture.node_names import names_of
from lorafx.capture.record import GraphRecord
from lorafx.capture.recorder import Stage
from lorafx.inspection.report import size
from lorafx.inspection.viewer.dump import sources_of
from lorafx.passes.outline.outline import INVOKE
from lorafx.passes.outline.regions import is_view
from lorafx.program.context import SiteState
from lorafx.program.frame import FrameInput
from lorafx.program.program import Program
from lorafx.torch_internals.compat import size_hint

_NODE = ("name", "line", "inputs", "op", "operator", "value", "path", "kind", "facts")
_SITE = ("Site", "Class", "K → N", "Delta", "Form", "Row map", "Strategy")
_REFUSAL = ("paths", "when", "reason")

#: Inputs that are in no box: the nodes that read them name them.
_HIDDEN = ("", "weight", "bank", "state", "packed", "symbol")
#: The layer that a module belongs to: its path up to the first number.
_LAYER = re.compile(r"(?:[^.]+\.)*?\d+(?=\.|$)")
#: Nodes of a box: the layout takes a tenth of a second for so many.
_MOST = 220


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


class _Boxes:
    """The boxes of a stage's picture: layers, inputs, and runs of nodes that are in no layer."""

    def __init__(self) -> None:
        self.labels: list[str] = []
        self._sizes: list[int] = []
        self._numbers: dict[tuple[object, ...], int] = {}
        self._last: tuple[object, ...] = ()

    def of(self, body: int, path: str, is_input: bool) -> int:
        """The number of a node's box. A node without path is beside the one before it."""
        layer = _LAYER.match(path)
        label = "inputs" if is_input else layer[0] if layer else path or "forward"
        key: tuple[object, ...] = (body, label)
        if not is_input and not layer:
            in_run = len(self._last) == 3
            stays = self._last[:1] == (body,) and (in_run or not path)
            key = self._last if stays else (body, label, len(self.labels))
        if not is_input:
            self._last = key
        number = self._numbers.get(key)
        if number is None or self._sizes[number] == _MOST:
            number = self._numbers[key] = len(self.labels)
            self.labels.append(label)
            self._sizes.append(0)
        self._sizes[number] += 1
        return number


def graph_data(record: GraphRecord, program: Program) -> dict[str, Any]:
    """All data of a graph: `stages`, and tables of the nodes, sites and refusals that these name by
    number. A node's `inputs` are names of operands; its `facts` are words with their texts."""
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
        self._before: list[int] = []

    def stage(self, stage: Stage) -> dict[str, Any]:
        """A stage. `nodes`: number, body, box (None: not in the picture), mark, and whether the
        pass changed it; `sites`: the sites of each number."""
        calls: dict[Any, Iterator[str]] = {item.name: iter(item.paths) for item in self._outlined}
        refused = {path for item in stage.refusals for path in item.paths}
        before, boxes = set(self._before), _Boxes()
        nodes: list[tuple[Any, ...]] = []
        served: dict[int, list[int]] = {}
        for body, (path, graph) in enumerate(stage.graphs.items()):
            printer = Printer(path, self._names)
            for node in graph.nodes:
                called = ""
                if node.target is INVOKE and node.args[1] in calls:
                    called = next(calls[node.args[1]], "")
                states = stage.sites.get((path, node.name), ())
                item = None if path else stage.inputs.get(node.name)
                kind = "" if item is None else item.kind
                module = called or path_of(stage, (path, node.name), node)
                if item is not None:
                    module = _module_of(item)
                number = self.nodes.number(
                    node.name if node.op == "output" else printer.name(node),
                    printer.line(node),
                    tuple(map(printer.name, node.all_input_nodes)),
                    node.op,
                    _operator(node, printer, kind),
                    value_text(node),
                    module,
                    kind,
                    _facts(node, printer, stage, module, kind, states),
                )
                if states:
                    served[number] = [self.sites.number(*self._site(node, s)) for s in states]
                box = None if _hidden(node, kind) else boxes.of(body, module, bool(kind))
                changed = bool(before) and number not in before
                nodes.append((number, body, box, _mark(node, module, states, refused), changed))
        more = len(nodes) - (len(self._before) or len(nodes))
        self._before = [number for number, *_ in nodes]
        report = stage.report
        edits = f"{len(nodes)} nodes" if report is None else f"{report.edits} edits"
        refusals = ((item.paths, item.when, item.reason) for item in stage.refusals)
        return {
            "name": stage.name,
            "idle": report is not None and not report.edits,
            "did": edits + (f", {more:+d}" if more else ""),
            "time": "as traced" if report is None else f"{report.seconds * 1e3:.1f} ms",
            "bodies": list(stage.graphs),
            "boxes": boxes.labels,
            "nodes": nodes,
            "sites": list(served.items()),
            "refusals": [self.refusals.number(*row) for row in refusals],
        }

    def _site(self, node: fx.Node, state: SiteState) -> tuple[str, ...]:
        site, sizes = state.site, _sizes(value_of(node))
        rank = self._program.home(site)[0].bank.max_rank
        read = {"linear": site.in_features * len(site.parts), "embedding": 0}.get(
            site.eligible.kind
        )
        delta = f"rank {rank}"
        if sizes and read is not None:  # x Aᵀ for each part, and the sum with B
            flops = 2 * math.prod(sizes[:-1]) * rank * (read + site.out_features)
            delta = f"{size(flops, 'FLOP')} at {delta}"
        return (
            *(site.path, type(site.module).__qualname__),
            *(f"{site.in_features} → {site.out_features}", delta),
            *(state.form, state.rows, state.strategy or "not planned yet"),
        )


def _mark(node: fx.Node, path: str, states: Sequence[SiteState], refused: set[str]) -> str:
    """The colour of a node: "refused", "pack", "site" or ""."""
    if node.op != "placeholder" and refused.intersection([path, *(s.site.path for s in states)]):
        return "refused"
    if any(state.form == "packed" for state in states):
        return "pack"
    return "site" if states else ""


def _hidden(node: fx.Node, kind: str) -> bool:
    return (
        node.op == "get_attr"
        or (node.op == "placeholder" and kind in _HIDDEN)
        or value_text(node).startswith("Sym(")
    )


def _operator(node: fx.Node, printer: Printer, kind: str) -> str:
    """The operator without its library: "mm" for torch.ops.aten.mm.default."""
    if node.op in ("placeholder", "output"):
        return kind or node.op
    target: Any = node.target
    text = printer.text(target) if node.op == "call_function" else str(target)
    if not text.startswith("torch.ops."):
        return text.rpartition(".")[2]
    library, name, *_ = text.removeprefix("torch.ops.").split(".")
    return name if library in ("aten", "higher_order") else f"{library}.{name}"


def _facts(
    node: fx.Node,
    printer: Printer,
    stage: Stage,
    path: str,
    kind: str,
    states: Sequence[SiteState],
) -> tuple[tuple[str, str], ...]:
    target: Any = node.target
    source, code = users_line(str(node.meta.get("stack_trace") or ""))
    cls = _class_of(node) or (type(states[0].site.module).__qualname__ if states else "")
    facts = {
        "Operator": printer.text(target) if node.op == "call_function" else str(target),
        "Result": value_text(node),
        "Module": path,
        "Class": cls,
        "Source": source,
        "Code": code,
        "Cost": _cost(node, stage),
    }
    if node.op == "placeholder":
        facts["Operator"] = f"an input: {kind or 'of the graph'}"
    return tuple((word, text) for word, text in facts.items() if text)


def _cost(node: fx.Node, stage: Stage) -> str:
    """Bytes and FLOPs at the sizes of the call that was captured, if nothing is fused."""
    own = _bytes(node)
    if node.op in ("placeholder", "get_attr"):
        return f"{size(own)} in memory"
    if node.op == "output" or is_view(node):
        return "none: no memory is moved"
    banks = [
        source
        for source in node.all_input_nodes
        if source.name in stage.inputs and stage.inputs[source.name].kind == "bank"
    ]
    read = sum(_bytes(source) for source in node.all_input_nodes if source not in banks)
    text = f"reads {size(read)}, writes {size(own)}, if nothing is fused"
    if banks:
        text += f"; and of banks, {size(sum(map(_bytes, banks)))} with all slots, "
        text += "what the batch's adapters have"
    flops = _flops(node)
    return text + (f"; {size(flops, 'FLOP')}" if flops else "")


def _bytes(node: fx.Node) -> int:
    value = value_of(node)
    sizes = _sizes(value)
    return math.prod(sizes) * value.dtype.itemsize if sizes else 0


def _module_of(item: FrameInput) -> str:
    sites = item.group.sites if item.group is not None else item.sites
    if sites:
        return sites[0].path
    return item.holder.path if item.holder is not None else ""


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
