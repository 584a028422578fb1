"""Finds where the compiled form of a right graph leaves tolerance.

The graph is recompiled with inner values as results: those of the sites, then of all nodes. That
may change fusion and hide a fault. If nothing differs so, the graph is cut off behind each site in
turn. The rest of the model continues with results of the graph run node by node.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, fx

from lorafx.bisection.first_site import Run, between, recorded
from lorafx.bisection.reference import difference
from lorafx.bisection.result import FirstSite
from lorafx.capture.driver import stays
from lorafx.capture.lowering import Lowering
from lorafx.capture.record import Stage, copied
from lorafx.torch_internals.trees import tree_leaves


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
        values = [
            node
            for node in want.graph.nodes
            if node.name in want.values and want.values[node.name].is_floating_point()
        ]
        sites = [node for node in values if stage.paths(node)]
        for shown in (sites, values):
            found = between([want], [self._with_values(want, given, shown)], self.tolerance)
            if found is not None and (not found.behind or shown is values):
                self.site = found
                return
        self.site = self._by_cutting(want, given, sites)
        if self.site is None:
            self.notes.append(
                "compiled with its values as further results, or cut off behind any site, the "
                "graph is right: the fault is in what operators are fused into"
            )

    def _with_values(self, want: Run, given: Sequence[Any], nodes: Sequence[fx.Node]) -> Run:
        graph = copied(want.stage.graph)
        output = graph.graph.output_node()
        named = {node.name: node for node in graph.graph.nodes}
        shown = list(dict.fromkeys(n for n in (*nodes, *want.returned) if n.name in want.values))
        (results,) = output.args
        results = results if isinstance(results, (tuple, list)) else (results,)
        output.args = ((*results, *(named[node.name] for node in shown)),)
        graph.recompile()
        pairs = zip(shown, self._compiled(graph, given)[len(results) :], strict=True)
        return Run(want.stage, {node.name: value for node, value in pairs})

    def _by_cutting(
        self, want: Run, given: Sequence[Any], sites: Sequence[fx.Node]
    ) -> FirstSite | None:
        """The first of `sites` behind which the cut-off graph is wrong."""

        def found(node: fx.Node) -> FirstSite | None:
            cut = _cut_off(want.stage.graph, node)
            value = self._compiled(cut, given)[0]
            return between([want], [Run(want.stage, {node.name: value})], self.tolerance)

        low, high, last = 0, len(sites), None
        while low < high:
            middle = (low + high) // 2
            wrong = found(sites[middle])
            low, high = (low, middle) if wrong else (middle + 1, high)
            last = wrong or last
        return last

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


def cloned(values: Sequence[Any]) -> list[Any]:
    return [item.clone() if isinstance(item, Tensor) else item for item in values]
