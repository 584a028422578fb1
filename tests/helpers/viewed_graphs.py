"""Graphs as the viewer gets them, made by hand, with texts that try to leave the page; and the data
of a page that was written."""

from __future__ import annotations

import base64
import json
import re
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

from lorafx.viewer.stages import GraphView, NodeView, RefusalView, SiteView, Span, StageView

HOSTILE = '</script><img src=x onerror="document.title=1">\u2028"\\'
REASON = f"its weight is read by {HOSTILE}"


def node(name: str, op: str = "call_function", *inputs: str, **more: Any) -> NodeView:
    target = more.pop("target", f"torch.ops.aten.{name.partition('_')[0]}.default")
    line = f"        {name} = {target}({', '.join(inputs)})"
    return NodeView(name, op, target, line, inputs, **more)


def site(path: str, form: str = "mark", strategy: str = "") -> SiteView:
    return SiteView(path, "Linear", 4, 8, 2, 48, "one row a slot", form, strategy)


def by_hand() -> GraphView:
    """Two stages of two layers: `pack` makes one node of the two of layer 0; layer 1 is refused."""
    sized = {"value": "float32[2, 4]", "sizes": (2, 4), "itemsize": 4}
    x = node("x", "placeholder", kind="argument", free=True, **sized)
    w = node("w", "placeholder", kind="weight", free=True, path="layers.0.q", **sized)
    q = node("mm_q", "call_function", "x", "w", path="layers.0.q", flops=128, **sized)
    k = node("mm_k", "call_function", "x", "w", path="layers.0.k", **sized)
    odd = node(
        "relu_1", "call_function", "mm_q", "mm_k", path="layers.1.up", cls=HOSTILE, source=HOSTILE
    )
    end = node("output", "output", "relu_1")
    packed = node("mm_packed", "call_function", "x", "w", path="layers.0.q", cls="Linear", **sized)
    later = replace(odd, inputs=("mm_packed",), line=odd.line.replace("mm_q, mm_k", "mm_packed"))
    refusals = (RefusalView(("layers.1.up",), "mixed", REASON),)
    first = StageView(
        *("captured", None, 0.0, 10.0),
        graphs=(("", (x, w, q, k, odd, end)),),
        sites={q: (site("layers.0.q"),), k: (site("layers.0.k"),)},
    )
    last = StageView(
        *("pack", 1, 0.25, 10.5),
        graphs=(("", (x, w, packed, later, end)),),
        sites={
            packed: tuple(site(f"layers.0.{name}", "packed", "generated (why)") for name in "qk")
        },
        refusals=refusals,
    )
    spans = [Span("Dynamo", 8.0, 9.5), Span("passes", 9.9, 10.6), Span("AOTAutograd", 9.5, 10.75)]
    sources = {"kernel.py": HOSTILE}
    return GraphView("graph 0 lora", "first call", [first, last], spans, sources=sources)


def deep(layers: int, nodes: int) -> GraphView:
    """Equal layers one after the other, each a chain of nodes that also read its first one."""
    found = [node("x", "placeholder", kind="argument")]
    for layer in range(layers):
        last = first = found[-1].name
        for number in range(nodes):
            last, before = f"add_{layer}_{number}", last
            found.append(node(last, "call_function", before, first, path=f"layers.{layer}.up"))
    return GraphView(
        "graph 0", "first call", [StageView("captured", None, 0.0, 1.0, (("", (*found,)),))]
    )


def page_data(page: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What index.html says about the model, and its graphs."""
    text = page.read_text(encoding="utf-8")
    (about,) = re.findall(r'<script type="text/plain" id="about">([^<]*)</script>', text)
    graphs = re.findall(r'<script type="text/plain" class="graph">([^<]*)</script>', text)
    found = [json.loads(zlib.decompress(base64.b64decode(each))) for each in (about, *graphs)]
    return found[0], found[1:]


def stage_nodes(graph: dict[str, Any], index: int) -> list[tuple[str, list[Any]]]:
    """Names of a stage's graphs, each with its nodes as they were written."""
    found = []
    for name, runs in graph["stages"][index]["graphs"]:
        pairs = zip(runs[::2], runs[1::2], strict=True)
        found.append(
            (
                name,
                [graph["nodes"][n] for first, count in pairs for n in range(first, first + count)],
            )
        )
    return found
