"""A graph's stages as one short text: JSON, deflated, in base64.

A node that several stages share is written once; a stage is the runs of nodes that it consists of,
and texts that many nodes share are numbers of a table. A model of 32 layers takes a few hundred
kilobytes so. `page/model.js` reads this.
"""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Iterable
from typing import Any

from lorafx.viewer.stages import GraphView, NodeView, RefusalView, SiteView, StageView, exclusive


def packed(value: Any) -> str:
    """JSON that a page can hold: base64 has no character that ends a script."""
    text = json.dumps(value, separators=(",", ":"))
    return base64.b64encode(zlib.compress(text.encode(), 6)).decode()


class _Table:
    """Values by number, in the order in which they came."""

    def __init__(self) -> None:
        self.numbers: dict[Any, int] = {}

    def __call__(self, value: Any) -> int:
        return self.numbers.setdefault(value, len(self.numbers))

    @property
    def values(self) -> list[Any]:
        return list(self.numbers)


def graph_data(graph: GraphView) -> dict[str, Any]:
    """All of one graph, as `page/model.js` reads it."""
    texts, sites, refusals = _Table(), _Table(), _Table()
    numbers: dict[NodeView, int] = {}
    stages = [_stage(stage, numbers, sites, refusals) for stage in graph.stages]
    return {
        "title": graph.title,
        "reason": graph.reason,
        "form": dict(graph.form),
        "facts": list(graph.facts),
        "sources": dict(graph.sources),
        "seconds": exclusive(graph.spans),
        "stages": stages,
        "nodes": [_node(node, texts) for node in numbers],
        "sites": [_site(site, texts) for site in sites.values],
        "refusals": [_refusal(refusal) for refusal in refusals.values],
        "texts": texts.values,
    }


def _stage(
    stage: StageView, numbers: dict[NodeView, int], sites: _Table, refusals: _Table
) -> dict[str, Any]:
    graphs = []
    for name, nodes in stage.graphs:
        found = [numbers.setdefault(node, len(numbers)) for node in nodes]
        graphs.append([name, _runs(found)])
    return {
        "name": stage.name,
        "edits": stage.edits,
        "seconds": round(stage.seconds, 6),
        "graphs": graphs,
        "sites": [
            [numbers[node], [sites(site) for site in served]]
            for node, served in stage.sites.items()
            if node in numbers
        ],
        "refusals": [refusals(refusal) for refusal in stage.refusals],
    }


def _runs(numbers: Iterable[int]) -> list[int]:
    """Consecutive numbers as first, count, first, count, ..."""
    found: list[int] = []
    for number in numbers:
        if found and number == found[-2] + found[-1]:
            found[-1] += 1
        else:
            found += [number, 1]
    return found


def _node(node: NodeView, texts: _Table) -> list[Any]:
    shared = (node.op, node.target, node.value, node.path, node.cls, node.source, node.code)
    return [
        node.name,
        node.line,
        list(node.inputs),
        *(texts(text) for text in (*shared, node.kind)),
        list(node.sizes),
        node.itemsize,
        int(node.free),
        node.flops,
    ]


def _site(site: SiteView, texts: _Table) -> list[Any]:
    shown = (site.rows, site.form, site.strategy)
    return [site.path, texts(site.cls), site.k, site.n, site.rank, site.flops, *map(texts, shown)]


def _refusal(refusal: RefusalView) -> list[Any]:
    return [list(refusal.paths), refusal.when, refusal.reason]
