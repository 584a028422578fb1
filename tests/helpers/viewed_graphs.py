"""Graphs as the viewer's page gets them, made by hand, with texts that try to leave the page; and
the data of a page that was written."""

from __future__ import annotations

import base64
import json
import re
import zlib
from pathlib import Path
from typing import Any

from lorafx.inspection.viewer.page_data import html, packed
from lorafx.program.program import PassReport

HOSTILE = '</script><img src=x onerror="document.title=1">\u2028"\\'
REASON = f"its weight is read by {HOSTILE}"


def node(name: str, op: str = "call_function", *inputs: str, **more: Any) -> dict[str, Any]:
    operator = name.partition("_")[0]
    text = {"name": name, "line": f"{name} = {operator}({', '.join(inputs)})", "op": op}
    plain = {"inputs": [*inputs], "operator": operator, "value": "", "path": "", "kind": ""}
    return {**text, **plain, "facts": [["Operator", operator]], "sites": [], **more}


def site(path: str, form: str = "mark", strategy: str = "") -> list[list[str]]:
    sizes = [["Class", "Linear"], ["K → N", "4 → 8"], ["Form", form]]
    return [["Site", path], *sizes, ["Row map", "one row"], ["Strategy", strategy]]


def by_hand() -> dict[str, Any]:
    """Two stages of two layers: `pack` makes one node of the two of layer 0; layer 1 is refused."""
    packed_sites = [site(f"layers.0.{name}", "packed", "generated (why)") for name in "qk"]
    nodes = [
        node("x", "placeholder", kind="argument", value="float32[2, 4]"),
        node("w", "placeholder", kind="weight", path="layers.0.q"),
        node("mm_q", "call_function", "x", "w", path="layers.0.q", sites=[site("layers.0.q")]),
        node("mm_k", "call_function", "x", "w", path="layers.0.k", sites=[site("layers.0.k")]),
        node("relu_1", "call_function", "mm_q", "mm_k", path="layers.1.up"),
        node("output", "output", "relu_1"),
        node("mm_packed", "call_function", "x", "w", path="layers.0.q", sites=packed_sites),
        node(
            "relu_1", "call_function", "mm_packed", path="layers.1.up", facts=[["Source", HOSTILE]]
        ),
    ]
    return {
        "title": "graph 0 lora",
        "reason": "first call",
        "facts": [],
        "sources": {"kernel.py": HOSTILE},
        "seconds": {"Dynamo": 1.5},
        "nodes": nodes,
        "stages": [
            stage(
                "captured",
                _BOXES,
                [(0, 0), (1, None), (2, 1, "site"), (3, 1, "site"), (4, 2), (5, 2)],
            ),
            stage(
                "pack",
                _BOXES,
                [(0, 0), (1, None), (6, 1, "pack", True), (7, 2, "refused", True), (5, 2)],
                refusals=[{"paths": ["layers.1.up"], "when": "mixed", "reason": REASON}],
                diff=HOSTILE,
            ),
        ],
    }


_BOXES = ["inputs", "layers.0", "layers.1"]


def stage(name: str, boxes: list[str], nodes: list[tuple[Any, ...]], **more: Any) -> dict[str, Any]:
    """`nodes`: number, box, mark, whether the pass changed it."""
    rows = [[number, 0, box, *rest, *("", False)[len(rest) :]] for number, box, *rest in nodes]
    found = {"name": name, "idle": False, "did": "1 edit", "time": "0.2 ms", "bodies": [""]}
    return {**found, "boxes": boxes, "nodes": rows, "refusals": [], "diff": "", **more}


def deep(layers: int, nodes: int) -> dict[str, Any]:
    """Equal layers one after the other, each a chain of nodes that also read its first one."""
    found, boxes = [node("x", "placeholder", kind="argument")], [(0, 0)]
    for layer in range(layers):
        last = first = found[-1]["name"]
        for number in range(nodes):
            last, before = f"add_{layer}_{number}", last
            boxes.append((len(found), layer + 1))
            found.append(node(last, "call_function", before, first, path=f"layers.{layer}.up"))
    labels = ["inputs", *(f"layers.{layer}" for layer in range(layers))]
    stages = [stage("captured", labels, boxes)]
    return {**by_hand(), "nodes": found, "stages": stages}


def write_page(page: Path, model: str, graph: dict[str, Any]) -> Path:
    """The page of a graph, with hostile texts beside it."""
    prepared = [PassReport(HOSTILE, 1, 0.5, notes=(HOSTILE,))]
    graphs = {f"{graph['title']}: {graph['reason']}": packed(graph)}
    page.write_text(html(model, prepared, graphs, {"explain.txt": HOSTILE}), encoding="utf-8")
    return page


def page_data(page: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What index.html says about the model, and its graphs."""
    text = page.read_text(encoding="utf-8")
    (about,) = re.findall(r'<script type="text/plain" id="about">([^<]*)</script>', text)
    graphs = re.findall(r'<script type="text/plain" class="graph">([^<]*)</script>', text)
    found = [json.loads(zlib.decompress(base64.b64decode(each))) for each in (about, *graphs)]
    return found[0], found[1:]
