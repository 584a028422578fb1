"""Dumps: every stage of a graph as a readable program, and the changes of each pass as a diff.

A legend above each graph explains its names and sizes. index.html is the viewer with the data of
all graphs, in one file that needs no network.
"""

from __future__ import annotations

import difflib
import re
import warnings
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from lorafx.capture.compilation import Observer
from lorafx.capture.graph_text import (
    names_of,
    stage_lines,
)
from lorafx.capture.record import GraphRecord, Stage
from lorafx.config import dump_folder
from lorafx.errors import LorafxWarning
from lorafx.inspection.explaining import explained
from lorafx.inspection.viewer.page_data import graph_data, html, packed
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
