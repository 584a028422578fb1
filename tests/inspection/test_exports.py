"""DOT of the last stage, and the trace of the compilation."""

from __future__ import annotations

import json
import re

import pytest
from viewed_graphs import HOSTILE, by_hand, record

from lorafx.capture.record import Span, exclusive
from lorafx.inspection.viewer.exports import to_dot, trace_events
from lorafx.program.preparation import PassReport


@pytest.mark.quick
def test_dot_has_the_nodes_and_edges_of_the_stage() -> None:
    title = f"graph {HOSTILE}".replace("\u2028", "")
    text = to_dot({**by_hand(), "title": title})
    labels = {
        name: json.loads(label).splitlines()
        for name, label in re.findall(r'(\w+) \[label=("(?:[^"\\]|\\.)*")', text)
    }
    names = {name: label[0] for name, label in labels.items()}
    assert sorted(names.values()) == ["mm_packed", "output", "relu_1", "x"]  # no weights
    assert {(names[a], names[b]) for a, b in re.findall(r"(\w+) -> (\w+);", text)} == {
        ("x", "mm_packed"),
        ("mm_packed", "relu_1"),
        ("relu_1", "output"),
    }
    assert ["mm_packed", "mm", "w", "float32[2, 8]"] in labels.values()
    assert f"digraph {json.dumps(title)} {{" in text
    assert text.count("{") - title.count("{") == text.count("}")


@pytest.mark.quick
def test_the_trace_is_of_complete_events_that_nest() -> None:
    prepared = [PassReport("select", 2, 0.5, end=2.5, notes=("q: Linear",))]
    trace = json.loads(json.dumps(trace_events("Model", [record(), record()], prepared)))
    events = [event for event in trace["traceEvents"] if event["ph"] == "X"]
    named = [event for event in trace["traceEvents"] if event["ph"] == "M"]
    assert {event["name"] for event in named} == {"process_name", "thread_name"}
    assert all({"name", "ph", "pid", "tid", "ts", "dur"} <= event.keys() for event in events)
    (before,) = [event for event in events if event["tid"] == 0]
    assert (before["name"], before["ts"], before["dur"]) == ("select", 0.0, 5e5)
    assert before["args"] == {"found": 2, "notes": ["q: Linear"]}
    first = {event["name"]: event for event in events if event["tid"] == 1}
    assert set(first) == {"Dynamo", "AOTAutograd", "passes", "pack"}
    assert first["Dynamo"]["ts"] == pytest.approx(6e6)
    assert first["pack"]["ts"] == pytest.approx(8.25e6)
    assert first["pack"]["args"] == {"edits": 1, "nodes": 5}
    for inner, outer in (("pack", "passes"), ("passes", "AOTAutograd")):
        assert first[outer]["ts"] <= first[inner]["ts"]
        ends = [first[name]["ts"] + first[name]["dur"] for name in (inner, outer)]
        assert ends[0] <= ends[1]
    assert trace_events("Model", [])["traceEvents"][0]["args"] == {"name": "lorafx: Model"}


@pytest.mark.quick
def test_seconds_are_counted_once() -> None:
    spans = [Span("b", 1.0, 2.0), Span("c", 1.25, 1.5), Span("a", 0.0, 4.0), Span("b", 2.0, 3.0)]
    assert exclusive(spans) == {"a": 2.0, "b": 1.75, "c": 0.25}
    assert list(exclusive(spans)) == ["a", "b", "c"]
    assert exclusive([]) == {}
