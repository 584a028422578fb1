"""What one pass did, over a model or over a graph."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PassReport:
    """What one pass did.

    Attributes:
        edits: of a pass over a graph; of a pass over the model, how many items it found or made.
        nodes: of the graph after it; 0 for passes over the model.
        end: of a pass over the model, when it had ended, by `time.perf_counter`.
        notes: of a pass over the model, what it found and did, a line each.
    """

    name: str
    edits: int
    seconds: float
    nodes: int = 0
    end: float = 0.0
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        heading = f"{self.name}: {self.edits}, {self.seconds * 1e3:.1f} ms"
        return "\n  ".join([heading, *self.notes])
