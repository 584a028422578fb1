"""Graphs as the viewer's page gets them, made by hand, with texts that try to leave the page; and
the data of a page that was written."""

from __future__ import annotations

import base64
import json
import re
import zlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from lorafx.capture.record import Span, exclusive
from lorafx.program.pass_report import PassReport
from lorafx.viewer.page import Page

HOSTILE = '</script><img src=x onerror="document.title=1">\u2028"\\'
REASON = f"its weight is read by {HOSTILE}"

_PLAIN = {"value": "", "path": "", "cls": "", "source": "", "code": "", "kind": ""}
_SIZED = {"value": "float32[2, 4]", "sizes": [2, 4], "itemsize": 4}


def node(name: str, op: str = "call_function", *inputs: str, **more: Any) -> dict[str, Any]:
    target = f"torch.ops.aten.{name.partition('_')[0]}.default"
    text = {"name": name, "line": f"{name} = {target}({', '.join(inputs)})", "op": op}
    free = {"inputs": [*inputs], "target": target, "sizes": [], "itemsize": 0, "free": False}
    return {**text, **free, **_PLAIN, "flops": 0, **more}


def site(path: str, form: str = "mark", strategy: str = "") -> dict[str, Any]:
    sizes = {"k": 4, "n": 8, "rank": 2, "flops": 48, "rows": "one row a slot"}
    return {"path": path, "cls": "Linear", **sizes, "form": form, "strategy": strategy}


def record() -> Any:
    """What the page asks of a record beside its data."""
    spans = [Span("Dynamo", 8.0, 9.5), Span("passes", 9.9, 10.6), Span("AOTAutograd", 9.5, 10.75)]
    passes = [PassReport("pack", 1, 0.25, 5, 10.5)]
    return SimpleNamespace(title="graph 0 lora", reason="first call", spans=spans, passes=passes)


def by_hand() -> dict[str, Any]:
    """Two stages of two layers: `pack` makes one node of the two of layer 0; layer 1 is refused."""
    nodes = [
        node("x", "placeholder", kind="argument", free=True, **_SIZED),
        node("w", "placeholder", kind="weight", free=True, path="layers.0.q", **_SIZED),
        node("mm_q", "call_function", "x", "w", path="layers.0.q", **_SIZED),
        node("mm_k", "call_function", "x", "w", path="layers.0.k", **_SIZED),
        node("relu_1", "call_function", "mm_q", "mm_k", path="layers.1.up", cls=HOSTILE),
        node("output", "output", "relu_1"),
        node("mm_packed", "call_function", "x", "w", path="layers.0.q", cls="Linear", **_SIZED),
        node("relu_1", "call_function", "mm_packed", path="layers.1.up", source=HOSTILE),
    ]
    packed = [site(f"layers.0.{name}", "packed", "generated (why)") for name in "qk"]
    found = record()
    return {
        "title": found.title,
        "reason": found.reason,
        "facts": [],
        "sources": {"kernel.py": HOSTILE},
        "seconds": exclusive(found.spans),
        "nodes": nodes,
        "sites": [site("layers.0.q"), site("layers.0.k"), *packed],
        "refusals": [{"paths": ["layers.1.up"], "when": "mixed", "reason": REASON}],
        "stages": [
            stage("captured", [0, 1, 2, 3, 4, 5], sites=[[2, [0]], [3, [1]]]),
            stage("pack", [0, 1, 6, 7, 5], 1, 0.25, sites=[[6, [2, 3]]], refusals=[0]),
        ],
    }


def stage(
    name: str, nodes: list[int], edits: int | None = None, seconds: float = 0.0, **more: Any
) -> dict[str, Any]:
    found = {"name": name, "edits": edits, "seconds": seconds, "graphs": [["", nodes]]}
    return {**found, "sites": [], "refusals": [], **more}


def deep(layers: int, nodes: int) -> dict[str, Any]:
    """Equal layers one after the other, each a chain of nodes that also read its first one."""
    found = [node("x", "placeholder", kind="argument")]
    for layer in range(layers):
        last = first = found[-1]["name"]
        for number in range(nodes):
            last, before = f"add_{layer}_{number}", last
            found.append(node(last, "call_function", before, first, path=f"layers.{layer}.up"))
    stages = [stage("captured", [*range(len(found))])]
    return {**by_hand(), "nodes": found, "sites": [], "refusals": [], "stages": stages}


def write_page(
    folder: Path,
    model: str,
    graphs: list[dict[str, Any]],
    texts: Any = (),
    measured: Any = (),
    prepared: Any = (),
) -> Path:
    """The page of these graphs, written into `folder`."""
    page = Page(folder, model, dict(texts), dict(measured), prepared)
    for graph in graphs:
        page.add(record(), graph)
    page.write()
    return folder / "index.html"


def page_data(page: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What index.html says about the model, and its graphs."""
    text = page.read_text(encoding="utf-8")
    (about,) = re.findall(r'<script type="text/plain" id="about">([^<]*)</script>', text)
    graphs = re.findall(r'<script type="text/plain" class="graph">([^<]*)</script>', text)
    found = [json.loads(zlib.decompress(base64.b64decode(each))) for each in (about, *graphs)]
    return found[0], found[1:]
