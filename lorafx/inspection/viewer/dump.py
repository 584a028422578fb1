"""Dumps: every stage of a graph as a readable program, and each pass's changes as a diff.

A legend above each graph explains its names and sizes.
"""

from __future__ import annotations

import difflib
import re
import warnings
import weakref
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from lorafx.capture.graph_text import names_of, stage_lines
from lorafx.capture.record import GraphRecord, Stage, dump_folder
from lorafx.errors import LorafxWarning
from lorafx.inspection.explanation import explained
from lorafx.inspection.viewer.page import graph_data, html, packed
from lorafx.program.program import Program
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
    shown = (name for name in symbols if re.search(rf"\b{re.escape(name)}\b", text))
    found = [*NAMES, *(f"{name}: {symbols[name]}" for name in shown)]
    found += [f"one body for layers that are alike: {item}" for item in outlined]
    return ["#", *(f"# {line}" for line in found), "#"]


#: Folders -> the program that dumps into each.
_HELD: weakref.WeakValueDictionary[Path, Program] = weakref.WeakValueDictionary()


def folder_of(program: Program) -> Path | None:
    """The folder for a program's graphs: `dump_folder`, or a subfolder of its class's name
    (LlamaForCausalLM-2) while another model dumps there."""
    folder = found = dump_folder(program.options)
    number = 1
    while folder is not None and found is not None:
        holder = _HELD.get(found.absolute())
        if holder is None or holder is program or holder.runtime.session is None:
            _HELD[found.absolute()] = program
            break
        number += 1
        found = folder / f"{type(program.model).__name__}-{number}"
    return found


def graph_texts(record: GraphRecord) -> dict[str, str]:
    """File name -> stages with headings and legends, diffs, and generated code."""
    found: dict[str, str] = {}
    names = names_of(record.stages, record.sizes)
    words = {symbol: size.words for symbol, size in record.sizes.items()}
    before: list[str] = []
    for index, stage in enumerate(record.stages):
        lines, heading = stage_lines(stage, names), _heading(record, stage)
        top = [heading, *legend(lines, words, record.outlined)]
        found[f"{index:02d}-{stage.name}.py"] = "\n".join([*top, *lines, ""])
        if index:
            last = record.stages[index - 1].name
            changes = difflib.unified_diff(before, lines, last, stage.name, lineterm="", n=2)
            found[f"{index:02d}-{stage.name}.diff"] = "\n".join([heading, *changes, ""])
        before = lines
    for name, source in record.sources.items():
        found[name] = source if isinstance(source, str) else source()
    return found


def _heading(record: GraphRecord, stage: Stage) -> str:
    heading, report = f"# {record.title}, after {stage.name}", stage.report
    if report is None:
        return heading
    return f"{heading}: {report.edits} edits, {report.nodes} nodes, {report.seconds * 1e3:.1f} ms"


class Dump:
    """The dump of a program in a folder: each graph in a folder of its own, model.txt, explain.txt,
    and index.html, which shows all of it."""

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


class Dumps:
    """Dumps each graph of a session that keeps its stages, as `Backend.recorded`."""

    def __init__(self, session: Session) -> None:
        self._session = weakref.ref(session)
        self._dump: Dump | None = None

    def __call__(self, record: GraphRecord) -> None:
        session = self._session()
        folder = None if session is None else folder_of(session.program)
        if session is None or folder is None or not record.keeps_stages:
            return
        if self._dump is None or self._dump.folder != folder:
            self._dump = Dump(folder, session.program)
        try:  # a failure to write costs the dump, not the graph
            self._dump.add(record)
            self._dump.write(explained(session))
        except OSError as error:
            warnings.warn(
                f"there is no whole dump in {folder}, and models run without one: {error}. Change "
                "Options(dump=...) or the variable LORAFX_DUMP",
                LorafxWarning,
                stacklevel=2,
            )
