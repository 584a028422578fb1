"""A graph for Graphviz, and compile times for Perfetto."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lorafx.capture.record import GraphRecord
from lorafx.program.preparation import PassReport

#: Hidden inputs: the nodes that read them name them.
_STATE = frozenset({"weight", "bank", "state", "packed", "symbol"})
_SITE, _PACK, _REFUSED, _INPUT = "#cfe3ff", "#e5d5ff", "#ffd0cc", "#eeeeee"


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
    served = dict(stage["sites"])
    refused = {path for number in stage["refusals"] for path in data["refusals"][number]["paths"]}
    for index, (name, numbers) in enumerate(stage["graphs"]):
        nodes = {
            data["nodes"][number]["name"]: (
                data["nodes"][number],
                [data["sites"][site] for site in served.get(number, ())],
            )
            for number in numbers
        }
        lines += (f"  {line}" for line in _graph(f"g{index}", name, nodes, refused))
    return "\n".join([*lines, "}", ""])


_Nodes = Mapping[str, tuple[Mapping[str, Any], Sequence[Mapping[str, Any]]]]


def _graph(prefix: str, name: str, nodes: _Nodes, refused: set[str]) -> Iterator[str]:
    hidden = {
        key
        for key, (node, _) in nodes.items()
        if node["kind"] in _STATE or node["op"] == "get_attr"
    }
    places = {key: f"{prefix}n{i}" for i, key in enumerate(nodes) if key not in hidden}
    modules: dict[str, list[str]] = {}
    for key in places:
        modules.setdefault(nodes[key][0]["path"], []).append(key)
    if name:
        yield f"subgraph cluster_{prefix} {{ label={_quoted(name)}; style=dashed;"
    for number, (path, members) in enumerate(modules.items()):
        if path:
            yield f"subgraph cluster_{prefix}_{number} {{ label={_quoted(path)}; color=gray80;"
        for key in members:
            color = _color(*nodes[key], refused)
            fill = f', fillcolor="{color}"' if color else ""
            yield f"{places[key]} [label={_label(nodes[key][0], hidden)}{fill}];"
        if path:
            yield "}"
    for key, (node, _) in nodes.items():
        for source in node["inputs"]:
            if source in places and key in places:
                yield f"{places[source]} -> {places[key]};"
    if name:
        yield "}"


def _label(node: Mapping[str, Any], hidden: set[str]) -> str:
    operator = node["kind"]
    if node["op"] != "placeholder":
        operator = node["target"].removeprefix("torch.ops.")
    read = ", ".join(name for name in node["inputs"] if name in hidden)
    lines = [node["name"], operator if operator != node["name"] else "", read, node["value"]]
    return _quoted("\n".join(filter(None, lines)))


def _color(node: Mapping[str, Any], sites: Sequence[Mapping[str, Any]], refused: set[str]) -> str:
    if node["path"] in refused or any(site["path"] in refused for site in sites):
        return _REFUSED
    if sites:
        return _PACK if any(site["form"] == "packed" for site in sites) else _SITE
    return _INPUT if node["op"] == "placeholder" else ""


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

    def slice_of(name: str, thread: int, end: float, seconds: float, about: Any) -> dict[str, Any]:
        times = {"ts": round((end - seconds - first) * 1e6, 3), "dur": round(seconds * 1e6, 3)}
        return {"name": name, "cat": "compile", "ph": "X", "args": about} | _in(thread) | times

    events = [_named("process_name", 0, f"lorafx: {model}")]
    events.append(_named("thread_name", 0, "the model, before any graph"))
    for report in prepared:
        about: dict[str, Any] = {"found": report.edits, "notes": list(report.notes)}
        events.append(slice_of(report.name, 0, report.end, report.seconds, about))
    for thread, record in enumerate(records, 1):
        events.append(_named("thread_name", thread, f"{record.title}, {record.reason}"))
        for span in record.spans:
            events.append(slice_of(span.name, thread, span.end, span.end - span.start, {}))
        for report in record.passes:
            about = {"edits": report.edits, "nodes": report.nodes}
            events.append(slice_of(report.name, thread, report.end, report.seconds, about))
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def _named(what: str, thread: int, name: str) -> dict[str, Any]:
    return {"name": what, "ph": "M", "args": {"name": name}} | _in(thread)


def _in(thread: int) -> dict[str, Any]:
    return {"pid": 0, "tid": thread}
