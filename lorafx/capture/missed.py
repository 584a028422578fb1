"""What stands for the answer of a call where there is none, and why."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Missed:
    """A call is not answered. What it has changed is undone.

    Attributes:
        reason: why.
        file: the file of the call's graph, if one was compiled to be saved alone.
        unprepared: saved graphs that may serve the call; loading one now would take long.
    """

    reason: str = ""
    file: Path | None = None
    unprepared: Sequence[Path] = ()


class NoGraph(BaseException):
    """Takes a `Missed` through Dynamo, whose own conversions return code or raise: from
    `Traced` to `Entry.run_graph`."""

    def __init__(self, missed: Missed) -> None:
        super().__init__(missed)
        self.missed = missed
