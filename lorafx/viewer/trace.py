"""What compiling took, in Chrome's trace format, for Perfetto (ui.perfetto.dev) or chrome://tracing.

The first thread has the passes over the model. Each graph is another: Dynamo, AOTAutograd, the
passes and the lowering are its slices, and each pass is one inside of "passes".
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lorafx.program.preparation import PassReport
from lorafx.viewer.stages import GraphView


def trace_events(
    model: str, graphs: Sequence[GraphView], prepared: Sequence[PassReport] = ()
) -> dict[str, Any]:
    """The trace of a model and all of its graphs: complete events ("X"), microseconds from the
    first."""
    starts = [span.start for graph in graphs for span in graph.spans]
    starts += [stage.end - stage.seconds for graph in graphs for stage in graph.stages]
    starts += [report.end - report.seconds for report in prepared]
    first = min(starts, default=0.0)
    events: list[dict[str, Any]] = [_named("process_name", 0, f"lorafx: {model}")]
    events.append(_named("thread_name", 0, "the model, before any graph"))
    for report in prepared:
        about = {"found": report.edits, "notes": list(report.notes)}
        start = report.end - report.seconds - first
        events.append(_slice(report.name, 0, start, report.seconds, about))
    for thread, graph in enumerate(graphs, 1):
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
