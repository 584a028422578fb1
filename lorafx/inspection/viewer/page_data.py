"""The viewer's page, and the data that it shows of a graph, in JSON types."""

from __future__ import annotations

import base64
import json
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from importlib.resources import files
from typing import Any

import jinja2
from torch import fx

from lorafx.capture.graph_text import (
    Printer,
    names_of,
    path_of,
    users_line,
    value_text,
)
from lorafx.capture.record import GraphRecord, Stage
from lorafx.program.bodies import INVOKE
from lorafx.program.context import SiteState
from lorafx.program.inputs import FrameInput
from lorafx.program.program import PassReport

#: The scripts of the page, in their order.
_SCRIPTS = ("vendor/dagre.min.js", "vendor/cytoscape.min.js", "picture.js", "app.js")

_NODE = ("name", "line", "inputs", "op", "operator", "value", "path", "kind", "facts", "sites")

#: Kinds of inputs that the picture leaves out: their names are shown in the nodes that read them.
_HIDDEN = ("", "weight", "bank", "state", "packed", "symbol")
#: The layer that a module belongs to: its path up to the first number.
_LAYER = re.compile(r"(?:[^.]+\.)*?\d+(?=\.|$)")
#: The largest number of nodes in a box; the layout takes a tenth of a second for it.
_MOST = 220


def html(
    model: str, prepared: Sequence[PassReport], graphs: Mapping[str, str], texts: Mapping[str, str]
) -> str:
    """The page of a model: the passes over it, its graphs by title (`packed` data), and texts by
    file name."""
    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.from_string(_page_file("index.html.jinja")).render(
        model=model,
        passes=prepared,
        style=_page_file("style.css"),
        scripts=[_page_file(name) for name in _SCRIPTS],
        about=packed({"model": model, "graphs": list(graphs), "texts": dict(texts)}),
        graphs=list(graphs.values()),
    )


def packed(value: Any) -> str:
    """`value` as deflated JSON in base64, which cannot end a script element."""
    text = json.dumps(value, separators=(",", ":"))
    return base64.b64encode(zlib.compress(text.encode(), 6)).decode()


def _page_file(name: str) -> str:
    return files("lorafx.inspection.viewer").joinpath("page", name).read_text(encoding="utf-8")


def graph_data(record: GraphRecord, texts: Mapping[str, str]) -> dict[str, Any]:
    """The page's data of a graph, in JSON types; `texts` are those of `graph_texts`.

    A node that several stages share is in `nodes` once, and stages refer to it by its number. A
    node's `inputs` are names of operands; its `facts` are pairs of a title and a text.
    """
    encoder = _Encoder(record)
    stages = []
    for index, stage in enumerate(record.stages):
        changes = texts.get(f"{index:02d}-{stage.name}.diff", "")
        stages.append({**encoder.stage(stage), "diff": changes})
    facts = [f"outline: {item}" for item in record.outlined]
    return {
        "title": record.title,
        "reason": record.reason,
        "facts": facts + [record.saved] * bool(record.saved),
        "sources": {name: text for name, text in texts.items() if not name[0].isdecimal()},
        "seconds": record.seconds,
        "stages": stages,
        "nodes": [dict(zip(_NODE, row, strict=True)) for row in encoder.numbers],
    }


class _Boxes:
    """The boxes of a stage's picture: layers, inputs, and runs of nodes that are in no layer."""

    def __init__(self) -> None:
        self.labels: list[str] = []
        self._sizes: list[int] = []
        self._numbers: dict[tuple[object, ...], int] = {}
        self._last: tuple[object, ...] = ()

    def of(self, body: int, path: str, is_input: bool) -> int:
        """The number of a node's box. A node without a path is in the box of the one before it."""
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


class _Encoder:
    def __init__(self, record: GraphRecord) -> None:
        self.numbers: dict[tuple[Any, ...], int] = {}
        self._names = names_of(record.stages, record.sizes)
        self._outlined = record.outlined
        self._before: set[int] = set()

    def stage(self, stage: Stage) -> dict[str, Any]:
        """The data of a stage. An item of `nodes` is the node's number, body, box (None if it is
        not in the picture) and mark, and whether the pass changed it."""
        calls: dict[Any, Iterator[str]] = {item.name: iter(item.paths) for item in self._outlined}
        refused = {path for item in stage.refusals for path in item.paths}
        if stage.report is None:
            self._before = set()
        boxes = _Boxes()
        nodes: list[tuple[Any, ...]] = []
        for body, (path, graph) in enumerate(stage.graphs.items()):
            printer = Printer(path, self._names[stage])
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
                row = (
                    node.name if node.op == "output" else printer.name(node),
                    printer.line(node),
                    tuple(map(printer.name, node.all_input_nodes)),
                    node.op,
                    _operator(node, printer, kind),
                    value_text(node),
                    module,
                    kind,
                    _facts(node, printer, module, kind),
                    tuple(map(_site_facts, states)),
                )
                number = self.numbers.setdefault(row, len(self.numbers))
                box = None if _hidden(node, kind) else boxes.of(body, module, bool(kind))
                changed = bool(self._before) and number not in self._before
                nodes.append((number, body, box, _mark(node, module, states, refused), changed))
        self._before = {number for number, *_ in nodes}
        report = stage.report
        return {
            "name": stage.name,
            "idle": report is not None and not report.edits,
            "did": (f"{report.edits} edits, " if report else "") + f"{len(nodes)} nodes",
            "time": f"{report.seconds * 1e3:.1f} ms" if report else "as traced",
            "bodies": list(stage.graphs),
            "boxes": boxes.labels,
            "nodes": nodes,
            "refusals": [
                {"paths": item.paths, "when": item.when, "reason": item.reason}
                for item in stage.refusals
            ],
        }


def _site_facts(state: SiteState) -> tuple[tuple[str, str], ...]:
    site = state.site
    return (
        ("Site", site.path),
        ("Class", type(site.module).__qualname__),
        ("K → N", f"{site.in_features} → {site.out_features}"),
        ("Form", state.form),
        ("Row map", state.rows),
        ("Strategy", state.strategy or "not planned yet"),
    )


def _mark(node: fx.Node, path: str, states: Sequence[SiteState], refused: set[str]) -> str:
    """What colours a node: "refused", "pack", "site" or ""."""
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
    """The short name of a node's operator: "mm" for torch.ops.aten.mm.default."""
    if node.op in ("placeholder", "output"):
        return kind or node.op
    target: Any = node.target
    text = printer.text(target) if node.op == "call_function" else str(target)
    if not text.startswith("torch.ops."):
        return text.rpartition(".")[2]
    library, name, *_ = text.removeprefix("torch.ops.").split(".")
    return name if library in ("aten", "higher_order") else f"{library}.{name}"


def _facts(node: fx.Node, printer: Printer, path: str, kind: str) -> tuple[tuple[str, str], ...]:
    target: Any = node.target
    source, code = users_line(str(node.meta.get("stack_trace") or ""))
    facts = {
        "Operator": printer.text(target) if node.op == "call_function" else str(target),
        "Result": value_text(node),
        "Module": path,
        "Class": _class_of(node),
        "Source": source,
        "Code": code,
    }
    if node.op == "placeholder":
        facts["Operator"] = f"an input: {kind or 'of the graph'}"
    return tuple((word, text) for word, text in facts.items() if text)


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
