"""What compiling took, in Chrome's trace format, for Perfetto (ui.perfetto.dev) or chrome://tracing.

A graph is a thread; Dynamo, AOTAutograd, the passes and the lowering are its slices, and each pass
is one inside of "passes".
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lorafx.viewer.stages import GraphView


def trace_events(model: str, graphs: Sequence[GraphView]) -> dict[str, Any]:
    """The trace of all graphs of a model: complete events ("X"), microseconds from the first."""
    starts = [span.start for graph in graphs for span in graph.spans]
    starts += [stage.end - stage.seconds for graph in graphs for stage in graph.stages]
    first = min(starts, default=0.0)
    events: list[dict[str, Any]] = [_named("process_name", 0, f"lorafx: {model}")]
    for thread, graph in enumerate(graphs):
        events.append(_named("thread_name", thread, f"{graph.title}, {graph.reason}"))
        for span in graph.spans:
            events.append(_slice(span.name, thread, span.start - first, span.end - span.start, {}))
        for stage in graph.stages:
            if stage.edits is not None:
                start = stage.end - stage.seconds - first
                about = {"edits": stage.edits, "nodes": stage.nodes}
                events.append(_slice(stage.name, thread, start, stage.seconds, about))
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def _named(what: str, thread: int, name: str) -> dict[str, Any]:
    return {"name": what, "ph": "M", "pid": 0, "tid": thread, "args": {"name": name}}


def _slice(
    name: str, thread: int, start: float, seconds: float, about: dict[str, Any]
) -> dict[str, Any]:
    return {
        "name": name,
        "cat": "compile",
        "ph": "X",
        "pid": 0,
        "tid": thread,
        "ts": round(start * 1e6, 3),
        "dur": round(seconds * 1e6, 3),
        "args": about,
    }
