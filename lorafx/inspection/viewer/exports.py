"""A graph for Graphviz, and compile times for Perfetto."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lorafx.capture.record import GraphRecord
from lorafx.program.preparation import PassReport

_COLORS = {"site": "#cfe3ff", "pack": "#e5d5ff", "refused": "#ffd0cc", "input": "#eeeeee"}


def to_dot(data: Mapping[str, Any]) -> str:
    """The last stage of `graph_data` for Graphviz, a box for each module. Sites are blue, packs
    purple, refused sites red; parameters and banks stand in labels."""
    stage = data["stages"][-1]
    title = f"{data['title']}, after {stage['name']}"
    lines = [
        f"digraph {_quoted(data['title'])} {{",
        f"  label={_quoted(title)}; labelloc=t; fontname=Helvetica;",
        '  node [shape=box, style="rounded,filled", fillcolor=white, fontname=Helvetica];',
        "  edge [color=gray40];",
    ]
    for body, name in enumerate(stage["bodies"]):
        rows = [row for row in stage["nodes"] if row[1] == body]
        lines += (f"  {line}" for line in _graph(f"g{body}", name, data["nodes"], rows))
    return "\n".join([*lines, "}", ""])


def _graph(
    prefix: str, name: str, nodes: Sequence[Mapping[str, Any]], rows: Sequence[Sequence[Any]]
) -> Iterator[str]:
    places: dict[str, str] = {}
    modules: dict[str, list[tuple[Mapping[str, Any], str]]] = {}
    for number, _, box, mark, _ in rows:
        node = nodes[number]
        if box is not None:
            places[node["name"]] = f"{prefix}n{len(places)}"
            modules.setdefault(node["path"], []).append((node, mark or (node["kind"] and "input")))
    if name:
        yield f"subgraph cluster_{prefix} {{ label={_quoted(name)}; style=dashed;"
    for number, (path, members) in enumerate(modules.items()):
        if path:
            yield f"subgraph cluster_{prefix}_{number} {{ label={_quoted(path)}; color=gray80;"
        for node, mark in members:
            read = ", ".join(source for source in node["inputs"] if source not in places)
            label = _quoted("\n".join(filter(None, _label(node, read))))
            fill = f', fillcolor="{_COLORS[mark]}"' if mark else ""
            yield f"{places[node['name']]} [label={label}{fill}];"
        if path:
            yield "}"
    for members in modules.values():
        for node, _ in members:
            for source in filter(places.__contains__, node["inputs"]):
                yield f"{places[source]} -> {places[node['name']]};"
    if name:
        yield "}"


def _label(node: Mapping[str, Any], read: str) -> tuple[str, ...]:
    operator = node["operator"] if node["operator"] != node["name"] else ""
    return node["name"], operator, read, node["value"]


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'


def trace_events(
    model: str, records: Sequence[GraphRecord], prepared: Sequence[PassReport] = ()
) -> dict[str, Any]:
    """Compile times in Chrome's trace format: complete events ("X"), in microseconds from the
    first. Thread 0: passes over the model; then a thread for each graph."""
    reports = [*prepared, *(report for record in records for report in record.passes)]
    starts = [span.start for record in records for span in record.spans]
    first = min([*starts, *(report.end - report.seconds for report in reports)], default=0.0)

    events: list[dict[str, Any]] = []

    def named(what: str, thread: int, name: str) -> None:
        events.append({"name": what, "ph": "M", "pid": 0, "tid": thread, "args": {"name": name}})

    def took(name: str, thread: int, end: float, seconds: float, **about: Any) -> None:
        times = {"ts": round((end - seconds - first) * 1e6, 3), "dur": round(seconds * 1e6, 3)}
        event = {"name": name, "cat": "compile", "ph": "X", "pid": 0, "tid": thread}
        events.append({**event, **times, "args": about})

    named("process_name", 0, f"lorafx: {model}")
    named("thread_name", 0, "the model, before any graph")
    for report in prepared:
        about = {"found": report.edits, "notes": list(report.notes)}
        took(report.name, 0, report.end, report.seconds, **about)
    for thread, record in enumerate(records, 1):
        named("thread_name", thread, f"{record.title}, {record.reason}")
        for span in record.spans:
            took(span.name, thread, span.end, span.end - span.start)
        for report in record.passes:
            about = {"edits": report.edits, "nodes": report.nodes}
            took(report.name, thread, report.end, report.seconds, **about)
    return {"traceEvents": events, "displayTimeUnit": "ms"}
