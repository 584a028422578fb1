"""DOT of the last stage, and the trace of the compilation."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from viewed_graphs import HOSTILE, by_hand, record, write_page

from lorafx.capture.record import Span, exclusive
from lorafx.program.pass_report import PassReport
from lorafx.viewer.exports import to_dot, trace_events

_TOKEN = re.compile(r'\s*("(?:[^"\\]|\\.)*"|->|[{}\[\]=;,]|[\w.]+)')


def parsed(text: str) -> tuple[dict[str, str], list[tuple[str, str]]]:
    """Labels by node and the edges of a DOT file that has no other forms than ours."""
    tokens, at = [], 0
    while text[at:].strip():
        match = _TOKEN.match(text, at)
        assert match, text[at : at + 80]
        tokens.append(match[1])
        at = match.end()
    assert tokens.count("{") == tokens.count("}")
    assert tokens.count("[") == tokens.count("]")
    labels, edges = {}, []
    for i, token in enumerate(tokens):
        if tokens[i + 1 : i + 4] == ["[", "label", "="]:
            labels[token] = json.loads(tokens[i + 4])
        if token == "->":
            edges.append((tokens[i - 1], tokens[i + 1]))
    return labels, edges


@pytest.mark.quick
def test_dot_has_the_nodes_and_edges_of_the_stage() -> None:
    title = f"graph {HOSTILE}".replace("\u2028", "")
    labels, edges = parsed(to_dot({**by_hand(), "title": title}))
    names = {key: label.splitlines()[0] for key, label in labels.items()}
    assert sorted(names.values()) == ["mm_packed", "output", "relu_1", "x"]  # no weights
    assert {(names[a], names[b]) for a, b in edges} == {
        ("x", "mm_packed"),
        ("mm_packed", "relu_1"),
        ("relu_1", "output"),
    }
    (packed,) = (label for label in labels.values() if label.startswith("mm_packed"))
    assert packed.splitlines() == ["mm_packed", "aten.mm.default", "w", "float32[2, 4]"]


@pytest.mark.quick
def test_dot_colours_packs_and_refusals() -> None:
    text = to_dot(by_hand())
    colours = dict(re.findall(r'\[label="(\w+)\\n.*fillcolor="(#\w+)"', text))
    assert colours == {"x": "#eeeeee", "mm_packed": "#e5d5ff", "relu_1": "#ffd0cc"}


@pytest.mark.skipif(shutil.which("dot") is None, reason="no dot (apt install graphviz)")
def test_graphviz_draws_it(tmp_path: Path) -> None:
    write_page(tmp_path, "Model", [by_hand()])
    path = tmp_path / "graph-0-lora" / "last.dot"
    done = subprocess.run(["dot", "-Tplain", path], capture_output=True, text=True, check=True)
    assert not done.stderr
    assert len(re.findall(r"^node ", done.stdout, re.MULTILINE)) == 4
    assert len(re.findall(r"^edge ", done.stdout, re.MULTILINE)) == 3


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
