"""Dumps: every stage of a graph as a readable program, and the changes of each pass as a diff.

A legend above each graph explains its names and sizes. index.html is the viewer with the data of
all graphs, in one file that needs no network.
"""

from __future__ import annotations

import base64
import difflib
import json
import re
import warnings
import weakref
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
from torch import fx

from lorafx.capture.compilation import Observer
from lorafx.capture.graph_text import (
    Printer,
    names_of,
    path_of,
    stage_lines,
    users_line,
    value_text,
)
from lorafx.capture.record import GraphRecord, Stage
from lorafx.config import dump_folder
from lorafx.errors import LorafxWarning
from lorafx.inspection.explanation import explained
from lorafx.program.bodies import INVOKE
from lorafx.program.context import SiteState
from lorafx.program.inputs import FrameInput
from lorafx.program.program import PassReport, Program
from lorafx.runtime.session import Session

NAMES = (
    "Nodes are named by the site or module that they belong to and by what they do, inputs by",
    "what they hold. (In the graph itself and in torch's own logs they have other names.) The",
    "comments are the module's path and the line of your own code. This is text; it does not run.",
)


def legend(
    lines: Iterable[str], symbols: Mapping[str, str], outlined: Sequence[object]
) -> list[str]:
    """The legend of a stage, as comments."""
    text = "\n".join(lines)
    used = (name for name in symbols if re.search(rf"\b{re.escape(name)}\b", text))
    comments = [*NAMES, *(f"{name}: {symbols[name]}" for name in used)]
    comments += [f"one body for layers that are alike: {item}" for item in outlined]
    return ["#", *(f"# {line}" for line in comments), "#"]


#: Folder -> the program that dumps into it.
_PROGRAMS: weakref.WeakValueDictionary[Path, Program] = weakref.WeakValueDictionary()


def folder_of(program: Program) -> Path | None:
    """The folder for a program's graphs: `dump_folder`, or a subfolder named by the model's class
    (LlamaForCausalLM-2) while another model dumps there."""
    root = folder = dump_folder(program.options)
    number = 1
    while root is not None and folder is not None:
        user = _PROGRAMS.get(folder.absolute())
        if user is None or user is program or user.runtime.session is None:
            _PROGRAMS[folder.absolute()] = program
            break
        number += 1
        folder = root / f"{type(program.model).__name__}-{number}"
    return folder


def graph_texts(record: GraphRecord) -> dict[str, str]:
    """File name -> text: stages with headings and legends, diffs, and generated code."""
    texts: dict[str, str] = {}
    names = names_of(record.stages, record.sizes)
    words = {symbol: size.words for symbol, size in record.sizes.items()}
    before: list[str] = []
    for index, stage in enumerate(record.stages):
        lines, heading = stage_lines(stage, names[stage]), _heading(record, stage)
        top = [heading, *legend(lines, words, record.outlined)]
        texts[f"{index:02d}-{stage.name}.py"] = "\n".join([*top, *lines, ""])
        if stage.report is not None:
            last = record.stages[index - 1].name
            changes = difflib.unified_diff(before, lines, last, stage.name, lineterm="", n=2)
            texts[f"{index:02d}-{stage.name}.diff"] = "\n".join([heading, *changes, ""])
        before = lines
    for name, source in record.sources.items():
        texts[name] = source if isinstance(source, str) else source()
    return texts


def _heading(record: GraphRecord, stage: Stage) -> str:
    heading, report = f"# {record.title}, after {stage.name}", stage.report
    if report is None:
        return heading
    return f"{heading}: {report.edits} edits, {report.nodes} nodes, {report.seconds * 1e3:.1f} ms"


class Dump:
    """The dump of a program: a folder for each graph, model.txt, explain.txt, and index.html, which
    shows all of them."""

    def __init__(self, folder: Path, program: Program) -> None:
        self.folder = folder
        self._program = program
        self._graphs: dict[str, str] = {}

    def add(self, record: GraphRecord) -> None:
        texts = graph_texts(record)
        self._graphs[f"{record.title}: {record.reason}"] = packed(graph_data(record, texts))
        for name, text in texts.items():
            _write(self.folder / record.title.replace(" ", "-") / name, text)

    def write(self, explanation: object) -> None:
        """Write the files of the model, beside the folders of the graphs."""
        name, prepared = type(self._program.model).__name__, self._program.prepared
        texts = {"explain.txt": f"{explanation}\n"}
        page = html(name, prepared, self._graphs, texts)
        model = "".join(f"{report}\n" for report in prepared)
        for file, text in {**texts, "model.txt": model, "index.html": page}.items():
            _write(self.folder / file, text)


def _write(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")


class Dumps(Observer):
    """Dumps each graph of a session, even one whose compilation fails."""

    def __init__(self, session: Session) -> None:
        self._session = weakref.ref(session)
        self._dump: Dump | None = None

    @property
    def keeps_stages(self) -> bool:
        session = self._session()
        return session is not None and dump_folder(session.program.options) is not None

    @contextmanager
    def compiling(self, record: GraphRecord) -> Iterator[None]:
        try:
            yield
        finally:
            self._write(record)

    def _write(self, record: GraphRecord) -> None:
        session = self._session()
        folder = None if session is None else folder_of(session.program)
        if session is None or folder is None or not record.keeps_stages:
            return
        if self._dump is None or self._dump.folder != folder:
            self._dump = Dump(folder, session.program)
        try:  # the graph is used even if its dump cannot be written
            self._dump.add(record)
            self._dump.write(explained(session))
        except OSError as error:
            warnings.warn(
                f"the dump in {folder} is incomplete, which no model depends on: {error}. Change "
                "Options(dump=...) or the variable LORAFX_DUMP",
                LorafxWarning,
                stacklevel=2,
            )


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
