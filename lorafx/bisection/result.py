"""What a bisection found."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lorafx.reports.report import Report, Table

BatchKind = Literal["mixed", "one adapter at a time"]


@dataclass(frozen=True)
class StageError:
    """The outputs with the graphs as one pass left them, run operator by operator.

    Attributes:
        batch: the batch that was served. Before `provenance` no graph knows its rows.
        error: largest difference from the reference, relative to the largest of 1 and its
            magnitude.
    """

    name: str
    batch: BatchKind
    error: float


@dataclass(frozen=True)
class FirstSite:
    """Where values first differ.

    Attributes:
        paths: the sites; several where one node computes them and nothing tells them apart.
        node: the node of the graph at which the difference was seen.
        where: its module and source line, where the graph says them.
        error: as `StageError.error`, of that node's value.
        behind: the node is none of the site's own: it computes with the site's result.
    """

    paths: tuple[str, ...]
    node: str
    where: str
    error: float
    behind: bool = False

    def __str__(self) -> str:
        sites = ", ".join(self.paths) or "no site"
        seen = "behind it, at" if self.behind else "at"
        return f"{sites}: {seen} node {self.node}{self.where}, difference {self.error:.3g}"


@dataclass(frozen=True)
class Bisection(Report):
    """The result of `lorafx.bisect`.

    Attributes:
        tolerance: the largest relative error that counts as right.
        reference: what outputs were compared with.
        served: the error of the model as it answers.
        stages: errors by pass, in the order of the passes.
        first: name of the first pass whose graphs' outputs are over the tolerance; None where there
            is none.
        site: the first site at which they are, where it was found.
        notes: what could not be looked at, and why.
        script: a program that shows the difference; None where there is none, or none was wanted.
    """

    tolerance: float
    reference: str
    served: float
    stages: tuple[StageError, ...]
    first: str | None = None
    site: FirstSite | None = None
    notes: tuple[str, ...] = ()
    script: Path | None = None

    def derived(self) -> dict[str, Any]:
        return {"script": None if self.script is None else str(self.script)}

    @property
    def heading(self) -> str:
        if self.first is None:
            return "no difference above tolerance"
        where = "" if self.site is None else f"; first site {self.site}"
        return f"first wrong after: {self.first}{where}"

    def facts(self) -> list[str]:
        return [
            f"reference: {self.reference}; tolerance {self.tolerance:.1g}; as served "
            f"{self.served:.3g}"
        ]

    def tables(self) -> list[Table]:
        rows = []
        for stage in self.stages:
            verdict = "ok" if stage.error <= self.tolerance else "over"
            rows.append((stage.name, f"{stage.error:.3g}", verdict, stage.batch))
        return [Table("", ("after", "error", "", "batch"), rows)]

    def notes_as_lines(self) -> list[str]:
        lines = [f"note: {note}" for note in self.notes]
        return lines + ([f"reproduced by: python {self.script}"] if self.script else [])
