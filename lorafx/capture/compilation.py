"""What compiling a captured frame gives, and who looks on meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

from torch import fx

from lorafx.capture.executable import Lowered
from lorafx.capture.record import GraphRecord
from lorafx.program.context import Context
from lorafx.program.frame import Frame
from lorafx.program.program import PassReport


@dataclass(frozen=True, eq=False)
class Compilation:
    """What the backend has made of a captured frame.

    Attributes:
        sources: Dynamo's sources of the frame's inputs.
        executable: what Dynamo calls.
        lowered: the graph from the lowering; None for calls without adapters (`base`).
        whole: whether the executable can be rebuilt from `lowered` alone.
    """

    record: GraphRecord
    frame: Frame
    sources: Sequence[Any]
    executable: Callable[..., Any]
    lowered: Lowered | None
    base: bool
    whole: bool


class Observer:
    """Sees what a backend compiles. Each method may be left as it is."""

    @property
    def keeps_stages(self) -> bool:
        """Whether records keep a copy of the graph after each pass."""
        return False

    def compiling(self, record: GraphRecord) -> AbstractContextManager[None]:
        """A block around the compilation, which also ends where that fails."""
        return nullcontext()

    def after(self, gm: fx.GraphModule, ctx: Context, done: PassReport | str) -> None:
        """Called with the graph as `GraphRecord.after` is."""

    def compiled(self, compilation: Compilation) -> None:
        """Called with the result."""

    def guarded(self, guards: Sequence[Any], kept: Sequence[bool], watched: Sequence[Any]) -> None:
        """Called when Dynamo has made the guards of the newest graph, with those that it keeps and
        those that places stand for."""
