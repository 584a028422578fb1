"""Graph dumps: every pass's graph as a readable program, and what the pass changed as a diff."""

from __future__ import annotations

import difflib
import os
from dataclasses import dataclass, field
from pathlib import Path

from torch import fx

from lorafx.config import Options


def dump_folder(options: Options) -> Path | None:
    """Where dumps go: `Options.dump`, else LORAFX_DUMP, else nowhere. The one place that asks."""
    folder = options.dump or os.environ.get("LORAFX_DUMP")
    return Path(folder) if folder else None


@dataclass
class GraphDump:
    """The graphs of one capture, kept as text and written as they come when a folder is given."""

    title: str
    folder: Path | None
    stages: list[tuple[str, str, str]] = field(default_factory=list)  # (name, heading, text)
    sources: dict[str, str] = field(default_factory=dict)  # kernels, reports; by file name
    _code: str | None = None  # of the last stage's graph

    def graph(
        self, name: str, gm: fx.GraphModule, *, edits: int | None = None, seconds: float = 0.0
    ) -> None:
        """Record the graph after pass `name`."""
        if edits == 0 and gm.code == self._code:  # printing would be most of such a pass's time
            text = self.stages[-1][2]
        else:
            text = gm.print_readable(print_output=False, include_stride=False, include_device=False)
        self._code = gm.code
        heading = f"# {self.title}, after {name}"
        if edits is not None:
            heading += f": {edits} edits, {len(gm.graph.nodes)} nodes, {seconds * 1e3:.1f} ms"
        self.stages.append((name, heading, text))
        if self.folder is not None:
            self._write(len(self.stages) - 1, self.folder)

    def source(self, name: str, text: str) -> None:
        """Record a text that belongs to the graph: a generated kernel's source, a report."""
        if name not in self.sources:
            self.sources[name] = text
            if self.folder is not None:
                self._write_source(name, self.folder)

    def write(self, folder: Path) -> None:
        """Write all stages and sources into `folder`, as LORAFX_DUMP would have."""
        for index in range(len(self.stages)):
            self._write(index, folder)
        for name in self.sources:
            self._write_source(name, folder)

    def _write_source(self, name: str, folder: Path) -> None:
        target = folder / self.title.replace(" ", "-")
        target.mkdir(parents=True, exist_ok=True)
        (target / name).write_text(self.sources[name])

    def _write(self, index: int, folder: Path) -> None:
        target = folder / self.title.replace(" ", "-")
        target.mkdir(parents=True, exist_ok=True)
        name, heading, text = self.stages[index]
        (target / f"{index:02d}-{name}.py").write_text(f"{heading}\n{text}\n")
        if index:
            before = self.stages[index - 1]
            lines = difflib.unified_diff(
                before[2].splitlines(), text.splitlines(), before[0], name, lineterm="", n=2
            )
            (target / f"{index:02d}-{name}.diff").write_text("\n".join([heading, *lines]) + "\n")
