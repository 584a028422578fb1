"""Graph dumps: every pass's graph as a readable program, and what the pass changed as a diff."""

from __future__ import annotations

import difflib
import os
from dataclasses import dataclass, field
from pathlib import Path

from lorafx.config import Options


def dump_folder(options: Options) -> Path | None:
    """Where dumps go: `Options.dump`, else LORAFX_DUMP, else nowhere. The one place that asks."""
    folder = options.dump or os.environ.get("LORAFX_DUMP")
    return Path(folder) if folder else None


@dataclass
class GraphDump:
    """The graphs of one capture, kept as text and written as they come when a folder is given.

    Lines are kept, which the stages have in common, and put together where they are read.
    """

    title: str
    folder: Path | None
    sources: dict[str, str] = field(default_factory=dict)  # kernels, reports; by file name
    _stages: list[tuple[str, str, tuple[str, ...]]] = field(default_factory=list)

    @property
    def stages(self) -> list[tuple[str, str, str]]:
        """Of each stage the pass, a heading and the graph."""
        return [(name, heading, "\n".join(lines)) for name, heading, lines in self._stages]

    def graph(
        self,
        name: str,
        lines: tuple[str, ...],
        *,
        nodes: int = 0,
        edits: int | None = None,
        seconds: float = 0.0,
    ) -> None:
        """Record the graph after pass `name`, which `GraphText` has printed."""
        heading = f"# {self.title}, after {name}"
        if edits is not None:
            heading += f": {edits} edits, {nodes} nodes, {seconds * 1e3:.1f} ms"
        self._stages.append((name, heading, lines))
        if self.folder is not None:
            self._write(len(self._stages) - 1, self.folder)

    def source(self, name: str, text: str) -> None:
        """Record a text that belongs to the graph: a generated kernel's source, a report."""
        if name not in self.sources:
            self.sources[name] = text
            if self.folder is not None:
                self._write_source(name, self.folder)

    def write(self, folder: Path) -> None:
        """Write all stages and sources into `folder`, as LORAFX_DUMP would have."""
        for index in range(len(self._stages)):
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
        name, heading, text = self._stages[index]
        (target / f"{index:02d}-{name}.py").write_text("\n".join([heading, *text, ""]))
        if index:
            before, _, lines = self._stages[index - 1]
            changes = difflib.unified_diff(lines, text, before, name, lineterm="", n=2)
            (target / f"{index:02d}-{name}.diff").write_text("\n".join([heading, *changes, ""]))
