"""A stage in Graphviz' language, a box for each module.

dot -Tsvg last.dot -o last.svg
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from lorafx.viewer.stages import NodeView, SiteView, StageView

#: Inputs that are not shown: each is read by the one or two nodes of a module, and named there.
_STATE = frozenset({"weight", "bank", "state", "packed", "symbol"})
_SITE, _PACK, _REFUSED, _INPUT = "#cfe3ff", "#e5d5ff", "#ffd0cc", "#eeeeee"


def to_dot(stage: StageView, title: str) -> str:
    """The graph of `stage` and the bodies that it calls.

    Sites are blue, packs purple, what a refused site computes red. Parameters and banks are left
    out; they stand in the labels of the nodes that read them.
    """
    lines = [
        f"digraph {_quoted(title)} {{",
        f"  label={_quoted(f'{title}, after {stage.name}')}; labelloc=t; fontname=Helvetica;",
        '  node [shape=box, style="rounded,filled", fillcolor=white, fontname=Helvetica];',
        "  edge [color=gray40];",
    ]
    for index, (name, nodes) in enumerate(stage.graphs):
        lines += (f"  {line}" for line in _graph(stage, f"g{index}", name, nodes))
    return "\n".join([*lines, "}", ""])


def _graph(stage: StageView, prefix: str, name: str, nodes: Sequence[NodeView]) -> Iterator[str]:
    hidden = {node.name for node in nodes if node.kind in _STATE or node.op == "get_attr"}
    places = {node.name: f"{prefix}n{i}" for i, node in enumerate(nodes) if node.name not in hidden}
    refused = {path for refusal in stage.refusals for path in refusal.paths}
    modules: dict[str, list[NodeView]] = {}
    for node in nodes:
        if node.name in places:
            modules.setdefault(node.path, []).append(node)
    if name:
        yield f"subgraph cluster_{prefix} {{ label={_quoted(name)}; style=dashed;"
    for number, (path, members) in enumerate(modules.items()):
        if path:
            yield f"subgraph cluster_{prefix}_{number} {{ label={_quoted(path)}; color=gray80;"
        for node in members:
            color = _color(node, stage.sites.get(node, ()), refused)
            fill = f', fillcolor="{color}"' if color else ""
            yield f"{places[node.name]} [label={_label(node, hidden)}{fill}];"
        if path:
            yield "}"
    for node in nodes:
        for source in node.inputs:
            if source in places and node.name in places:
                yield f"{places[source]} -> {places[node.name]};"
    if name:
        yield "}"


def _label(node: NodeView, hidden: set[str]) -> str:
    operator = node.target.removeprefix("torch.ops.") if node.op != "placeholder" else node.kind
    read = ", ".join(name for name in node.inputs if name in hidden)
    lines = [node.name, operator if operator != node.name else "", read, node.value]
    return _quoted("\n".join(line for line in lines if line))


def _color(node: NodeView, sites: Sequence[SiteView], refused: set[str]) -> str:
    if node.path in refused or any(site.path in refused for site in sites):
        return _REFUSED
    if sites:
        return _PACK if any(site.form == "packed" for site in sites) else _SITE
    return _INPUT if node.op == "placeholder" else ""


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'
