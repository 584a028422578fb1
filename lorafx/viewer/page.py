"""index.html: the viewer with all that it shows, in one file that needs no network."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2

from lorafx.program.preparation import PassReport
from lorafx.viewer.dot import to_dot
from lorafx.viewer.encode import graph_data, packed
from lorafx.viewer.stages import GraphView
from lorafx.viewer.trace import trace_events

#: In this order, each in a script element of its own.
SCRIPTS = (
    "vendor/dagre.min.js",
    "vendor/cytoscape.min.js",
    "model.js",
    "layout.js",
    "scene.js",
    "diff.js",
    "lists.js",
    "panels.js",
    "app.js",
)


@dataclass
class Page:
    """The page of one model's graphs, and the exports beside it.

    index.html, trace.json, model.txt, and in the folder of each graph last.dot, its last stage.
    """

    folder: Path
    model: str
    texts: dict[str, str] = field(default_factory=dict)  # reports on the model, by file name
    measured: Mapping[str, str] = field(default_factory=dict)  # by path of a site
    prepared: Sequence[PassReport] = ()  # of the passes over the model
    _graphs: list[GraphView] = field(default_factory=list)
    _packed: list[str] = field(default_factory=list)

    def add(self, graph: GraphView) -> None:
        """Add a graph that was compiled. It is encoded once, however often the page is written."""
        self._graphs.append(graph)
        self._packed.append(packed(graph_data(graph)))
        if graph.stages:
            target = folder_of(self.folder, graph.title)
            target.mkdir(parents=True, exist_ok=True)
            dot = to_dot(graph.stages[-1], graph.title)
            (target / "last.dot").write_text(dot, encoding="utf-8")

    def write(self) -> None:
        """Write the page and the trace with the graphs so far."""
        self.folder.mkdir(parents=True, exist_ok=True)
        trace = trace_events(self.model, self._graphs, self.prepared)
        (self.folder / "trace.json").write_text(json.dumps(trace))
        told = "".join(f"{report}\n" for report in self.prepared)
        (self.folder / "model.txt").write_text(told, encoding="utf-8")
        (self.folder / "index.html").write_text(self.html(), encoding="utf-8")

    def html(self) -> str:
        titles = [f"{graph.title}: {graph.reason}" for graph in self._graphs]
        about: dict[str, Any] = {"model": self.model, "graphs": titles, "texts": self.texts}
        about["measured"] = dict(self.measured)
        about["passes"] = [
            {
                "name": report.name,
                "found": report.edits,
                "seconds": round(report.seconds, 6),
                "notes": report.notes,
            }
            for report in self.prepared
        ]
        return _template().render(
            model=self.model,
            style=_part("style.css"),
            scripts=[_part(name) for name in SCRIPTS],
            about=packed(about),
            graphs=self._packed,
        )


def folder_of(folder: Path, title: str) -> Path:
    """Where the files of one graph are."""
    return folder / title.replace(" ", "-")


def write_page(
    folder: Path,
    model: str,
    graphs: list[GraphView],
    texts: Mapping[str, str] | None = None,
    measured: Mapping[str, str] | None = None,
    prepared: Sequence[PassReport] = (),
) -> None:
    """Write the page of `graphs`, and the exports beside it, at once.

    Args:
        texts: reports on the model, by file name.
        measured: what was measured of sites, by path.
        prepared: what the passes over the model did.
    """
    page = Page(folder, model, dict(texts or {}), measured or {}, prepared)
    for graph in graphs:
        page.add(graph)
    page.write()


def _part(name: str) -> str:
    return files("lorafx.viewer").joinpath("page", name).read_text(encoding="utf-8")


@functools.cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.from_string(_part("index.html.jinja"))
