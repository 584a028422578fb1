"""index.html: the viewer with its data, in a file that needs no network."""

from __future__ import annotations

import base64
import functools
import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2

from lorafx.capture.record import GraphRecord
from lorafx.inspection.viewer.exports import to_dot, trace_events
from lorafx.program.preparation import PassReport

#: In this order, each in a script element.
SCRIPTS = ("vendor/dagre.min.js", "vendor/cytoscape.min.js", "picture.js", "app.js")


@dataclass
class Page:
    """A model's page and exports: index.html, trace.json, model.txt, `texts` by file name, and
    last.dot in each graph's folder. `measured`: measurements of sites, by path."""

    folder: Path
    model: str
    texts: dict[str, str] = field(default_factory=dict)
    measured: Mapping[str, str] = field(default_factory=dict)
    prepared: Sequence[PassReport] = ()
    _records: list[GraphRecord] = field(default_factory=list)
    _graphs: list[tuple[str, str]] = field(default_factory=list)

    def add(self, record: GraphRecord, data: Mapping[str, Any]) -> None:
        self._records.append(record)
        self._graphs.append((f"{data['title']}: {data['reason']}", packed(data)))
        if data["stages"]:
            target = self.folder / data["title"].replace(" ", "-")
            target.mkdir(parents=True, exist_ok=True)
            (target / "last.dot").write_text(to_dot(data), encoding="utf-8")

    def write(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        trace = trace_events(self.model, self._records, self.prepared)
        model = "".join(f"{report}\n" for report in self.prepared)
        written = {"trace.json": json.dumps(trace), "model.txt": model, "index.html": self.html()}
        for name, text in {**written, **self.texts}.items():
            (self.folder / name).write_text(text, encoding="utf-8")

    def html(self) -> str:
        about = {
            "model": self.model,
            "graphs": [title for title, _ in self._graphs],
            "texts": self.texts,
            "measured": dict(self.measured),
        }
        return _template().render(
            model=self.model,
            passes=self.prepared,
            style=_part("style.css"),
            scripts=[_part(name) for name in SCRIPTS],
            about=packed(about),
            graphs=[data for _, data in self._graphs],
        )


def packed(value: Any) -> str:
    """Deflated JSON in base64, which cannot end a script element."""
    text = json.dumps(value, separators=(",", ":"))
    return base64.b64encode(zlib.compress(text.encode(), 6)).decode()


def _part(name: str) -> str:
    return files("lorafx.inspection.viewer").joinpath("page", name).read_text(encoding="utf-8")


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
