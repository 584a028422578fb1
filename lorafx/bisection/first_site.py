"""Finds the first site with wrong values in a graph.

Between two stages, common nodes have equal values as long as the pass is right. The first that
differs leads back to the site through the nodes that the pass made. Of a compiled graph only
outputs are seen, so it is cut off behind one site after the other.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from operator import getitem
from typing import Any

from torch import Tensor, fx

from lorafx.capture.driver import stays
from lorafx.capture.lowering import Lowering
from lorafx.capture.record import Stage, copied
from lorafx.capture.verify import cloned, difference
from lorafx.ownership.flow import module_path
from lorafx.torch_internals.graph_parts import tree_leaves

#: A node and the index of a result, None for all.
Source = tuple[fx.Node, int | None]


@dataclass(frozen=True)
class FirstSite:
    """Where values first differ.

    Attributes:
        paths: the sites; several where a node computes them together.
        node, where: the node with the difference, its module and source line.
        error: max |got − want| / max(1, max |want|) of that node's value.
        behind: whether the node only computes with the site's result.
    """

    paths: tuple[str, ...]
    node: str
    where: str
    error: float
    behind: bool = False

    def __str__(self) -> str:
        sites = ", ".join(self.paths) or "no site"
        seen = "behind it, at" if self.behind else "at"
        return f"{sites}: {seen} node {self.node}{self.where}, difference {self.error:.3g}"


@dataclass
class Run:
    """The values of a stage's nodes in a call of its graph."""

    stage: Stage
    values: dict[str, Tensor]

    @property
    def graph(self) -> fx.Graph:
        return self.stage.graph.graph

    @property
    def returned(self) -> list[fx.Node]:
        return list(self.graph.output_node().all_input_nodes)


class _Values(fx.Interpreter):
    """Copies each tensor when it is made: later operators may overwrite it."""

    def __init__(self, gm: fx.GraphModule) -> None:
        super().__init__(gm)
        self.seen: dict[str, Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, Tensor) and n.op != "placeholder":
            self.seen[n.name] = value.clone()
        return value


def recorded(stage: Stage, given: Sequence[Any], runs: list[Run]) -> Any:
    """The results of a stage; appends the values of its nodes to `runs`."""
    values = _Values(stage.graph)
    results = values.run(*given)
    runs.append(Run(stage, values.seen))
    return results


def between(before: Sequence[Run], after: Sequence[Run], tolerance: float) -> FirstSite | None:
    """The first difference between runs of the same calls: of common, else of returned nodes."""
    for good, bad in zip(before, after, strict=False):
        pairs = [(node.name, node) for node in bad.graph.nodes]
        pairs += [(was.name, now) for was, now in zip(good.returned, bad.returned, strict=False)]
        for name, node in pairs:
            if name in good.values and node.name in bad.values:
                error = difference(bad.values[node.name], good.values[name])
                if error > tolerance:
                    return _led_to(node, good, bad, error)
    return None


def _led_to(node: fx.Node, good: Run, bad: Run, error: float) -> FirstSite:
    """The site of a wrong value: among the pass's new nodes, else the node's, else an operand's."""
    names = {other.name for other in good.graph.nodes}

    def known(other: fx.Node) -> bool:
        return other.name in names

    sources = list(_sources(node, None))
    made = [source for source in sources if not (known(node) and known(source[0]))]
    paths = _nearest(made, bad.stage, known) or bad.stage.paths(node)
    behind = not paths
    if behind:
        paths = _nearest(made or sources, bad.stage, lambda _: False)
    return FirstSite(paths, node.name, _where(node), error, behind and bool(paths))


def _nearest(
    starts: Sequence[Source], stage: Stage, ends: Callable[[fx.Node], bool]
) -> tuple[str, ...]:
    """Sites of the nearest node backwards, up to nodes where `ends`; of a pack the part's site."""
    pending, seen = deque(starts), {node for node, _ in starts}
    while pending:
        node, index = pending.popleft()
        paths = stage.paths(node)
        if paths:
            return paths[index : index + 1] if index is not None and index < len(paths) else paths
        if ends(node):
            continue
        for source in _sources(node, index):
            if source[0] not in seen:
                seen.add(source[0])
                pending.append(source)
    return ()


def _sources(node: fx.Node, index: int | None) -> Iterator[Source]:
    if node.target is getitem:
        source: Any = node.args[0]
        yield source, int(node.args[1])  # type: ignore[arg-type]
        return
    for source in node.all_input_nodes:
        yield source, index if len(node.all_input_nodes) == 1 else None


def _where(node: fx.Node) -> str:
    path = module_path(node)
    lines = [line.strip() for line in str(node.meta.get("stack_trace") or "").splitlines()]
    source = [line for line in lines if line.strip("^~ ")]
    return (f" in {path}" if path else "") + (f" (`{source[-1]}`)" if source else "")


@dataclass
class CompiledParts:
    """Finds the first differing `site` in graphs given in order of their calls."""

    lowering: Lowering
    tolerance: float
    site: FirstSite | None = None
    notes: list[str] = field(default_factory=list)

    def run(self, stage: Stage, given: Sequence[Any]) -> Any:
        """The results of a stage run node by node, after checking its compiled form."""
        runs: list[Run] = []
        begun = cloned(given)  # operators may write into inputs
        results = recorded(stage, given, runs)
        if self.site is None and not self.notes:
            self._compare(runs[0], begun, tree_leaves(results))
        return results

    def _compare(self, want: Run, given: Sequence[Any], results: Sequence[Any]) -> None:
        stage = want.stage
        got = self._compiled(stage.graph, given)
        wrong = [
            f"{index} by {error:.3g}"
            for index, (value, right) in enumerate(zip(got, results, strict=True))
            if isinstance(right, Tensor) and (error := difference(value, right)) > self.tolerance
        ]
        if not wrong:
            return
        self.notes.append(f"outputs of the compiled graph that differ: {', '.join(wrong)}")
        sites = [
            node for node in want.graph.nodes if stage.paths(node) and node.name in want.values
        ]

        def error_behind(node: fx.Node) -> float:
            (value,) = self._compiled(_cut_off(stage.graph, node), given)
            return difference(value, want.values[node.name])

        def is_wrong(node: fx.Node) -> bool:
            return error_behind(node) > self.tolerance

        at = bisect_left(sites, True, key=is_wrong)
        if at < len(sites):
            node = sites[at]
            self.site = FirstSite(stage.paths(node), node.name, _where(node), error_behind(node))
        else:
            self.notes.append(
                "cut off behind any site, the graph is right: the fault is behind the last site, "
                "or in what operators are fused into"
            )

    def _compiled(self, gm: fx.GraphModule, given: Sequence[Any]) -> list[Any]:
        gm = copied(gm)  # compilers may change the graph
        inputs = [node.meta["val"] for node in gm.graph.find_nodes(op="placeholder")]
        run: Callable[[list[Any]], Any] = self.lowering.compile(gm, inputs)
        return tree_leaves(run(cloned(given)))


def _cut_off(gm: fx.GraphModule, last: fx.Node) -> fx.GraphModule:
    cut = copied(gm)
    behind = [node for node in cut.graph.nodes if node.op != "placeholder"]
    (node,) = (node for node in behind if node.name == last.name)
    cut.graph.output_node().args = ((node,),)
    for other in reversed(behind[behind.index(node) + 1 : -1]):
        cut.graph.erase_node(other)
    cut.graph.eliminate_dead_code(stays)
    cut.recompile()
    return cut
