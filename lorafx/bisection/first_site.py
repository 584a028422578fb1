"""The first site at which the values of a graph are wrong.

Between two stages: nodes that both have are equal in value as long as the pass between them is
right. From the first that is not, the way back leads through what the pass made to the site.
Without a stage before: the value of each site's node beside the result of its module with W + ΔW.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from operator import getitem
from typing import Any

from torch import Tensor, fx

from lorafx.bisection.reference import Modules
from lorafx.bisection.result import FirstSite
from lorafx.capture.differences import difference
from lorafx.graph.context import module_path
from lorafx.serving.staged_graphs import Stage


@dataclass
class Run:
    """The values of the nodes of one stage in one call of its graph."""

    stage: Stage
    values: dict[str, Tensor]


class _Recorder(fx.Interpreter):
    """Runs a graph and keeps a copy of each tensor as it was made: operators behind may write into
    it."""

    def __init__(self, gm: fx.GraphModule) -> None:
        super().__init__(gm)
        self.seen: dict[str, Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, Tensor) and n.op != "placeholder":
            self.seen[n.name] = value.clone()
        return value


def recorded(stage: Stage, given: Sequence[Any], runs: list[Run]) -> Any:
    """The results of a stage; `runs` gets the values of its nodes."""
    recorder = _Recorder(stage.graph)
    results = recorder.run(*given)
    runs.append(Run(stage, recorder.seen))
    return results


def between(before: Sequence[Run], after: Sequence[Run], tolerance: float) -> FirstSite | None:
    """The first difference between two runs of the same calls."""
    for good, bad in zip(before, after, strict=False):
        for node in bad.stage.graph.graph.nodes:
            if node.name not in good.values or node.name not in bad.values:
                continue
            error = difference(bad.values[node.name], good.values[node.name])
            if error > tolerance:
                return _traced(node, good, bad, error)
        found = _by_outputs(good, bad, tolerance)
        if found is not None:
            return found
    return None


def beside(runs: Sequence[Run], modules: Modules, tolerance: float) -> FirstSite | None:
    """The first difference from the results of the modules, in the order of their calls."""
    values: dict[str, list[tuple[fx.Node, Tensor]]] = {}
    for run in runs:
        for node in run.stage.graph.graph.nodes:
            for path in run.stage.sites.get(node.name, ()):
                if node.name in run.values:
                    values.setdefault(path, []).append((node, run.values[node.name]))
    for path, results in modules.items():
        for (node, got), want in zip(values.get(path, ()), results, strict=False):
            if got.numel() == want.numel():
                error = difference(got.reshape(want.shape), want)
                if error > tolerance:
                    return FirstSite((path,), node.name, _where(node), error)
    return None


def _by_outputs(good: Run, bad: Run, tolerance: float) -> FirstSite | None:
    """Where the graph returns another node than before."""
    pairs = zip(returned(good), returned(bad), strict=False)
    for was, now in pairs:
        if was.name in good.values and now.name in bad.values:
            error = difference(bad.values[now.name], good.values[was.name])
            if error > tolerance:
                return _traced(now, good, bad, error)
    return None


def returned(run: Run) -> list[fx.Node]:
    """The nodes that the graph returns."""
    return list(run.stage.graph.graph.output_node().all_input_nodes)


def _traced(node: fx.Node, good: Run, bad: Run, error: float) -> FirstSite:
    """The site that led to a wrong value: the nearest through what the pass made, else the node's
    own, else the nearest that it computes with."""
    names = {other.name for other in good.stage.graph.graph.nodes}

    def known(other: fx.Node) -> bool:
        return other.name in names

    def found(paths: tuple[str, ...], *, behind: bool = False) -> FirstSite:
        return FirstSite(paths, node.name, _where(node), error, behind)

    sources = list(_sources(node, None))
    made = [source for source in sources if not (known(node) and known(source[0]))]
    near = _nearest(made, bad, known)
    if near is not None:
        return found(near)
    if node.name in bad.stage.sites:
        return found(bad.stage.sites[node.name])
    far = _nearest(made or sources, bad, lambda _: False)
    return found(far or (), behind=far is not None)


def _nearest(
    starts: Sequence[tuple[fx.Node, int | None]], run: Run, ends: Callable[[fx.Node], bool]
) -> tuple[str, ...] | None:
    """The sites of the nearest node that has some, from `starts` backwards and not beyond nodes
    where `ends` is true; of a node of several sites the one whose part is taken."""
    pending, seen = deque(starts), {node for node, _ in starts}
    while pending:
        own, index = pending.popleft()
        paths = run.stage.sites.get(own.name)
        if paths:
            return paths[index : index + 1] if index is not None and index < len(paths) else paths
        if ends(own):
            continue
        for source in _sources(own, index):
            if source[0] not in seen:
                seen.add(source[0])
                pending.append(source)
    return None


def _sources(node: fx.Node, index: int | None) -> Iterator[tuple[fx.Node, int | None]]:
    """The nodes that it computes with, and which of several results it takes of each."""
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
