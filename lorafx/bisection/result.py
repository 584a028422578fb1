"""The result of a bisection."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lorafx.inspection.report import Report, Table

BatchKind = Literal["mixed", "one adapter at a time"]


@dataclass(frozen=True)
class StageError:
    """`error`, max |got − want| / max(1, max |want|), of outputs after a pass, run operator by
    operator. Before `provenance` graphs do not know a batch's rows."""

    name: str
    batch: BatchKind
    error: float


@dataclass(frozen=True)
class FirstSite:
    """Where values first differ.

    Attributes:
        paths: the sites; several where a node computes them together.
        node, where: the node with the difference, its module and source line.
        error: as `StageError.error`, of that node's value.
        behind: whether the node only computes with the site's result.
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
        reference: the reference of outputs.
        served: the error of the model as served.
        stages: errors by pass, in order.
        first: the first pass with errors over the tolerance, if any.
        notes: what could not be checked, and why.
        script: a program that shows the difference, if wanted.
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
