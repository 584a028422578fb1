"""What a viewer needs to know of a graph, without the graph: plain values, by stage.

The objects of nodes that a pass leaves alone are the same in the stage before and after it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple


@dataclass(frozen=True, eq=False, slots=True)
class NodeView:
    """One node as one stage has it.

    Attributes:
        name: of the node in its graph.
        op: of `torch.fx.Node.op`.
        target: the operator, as the text of the graph has it.
        line: the node as a line of the program.
        inputs: names of the nodes that it reads.
        value: dtype and shape of the result, or the size that it is.
        path: dotted path of the innermost module whose forward made it; "" where nothing says.
        cls: class of that module.
        source: file and line of the user's code that made it.
        code: that line.
        kind: of an input of the graph, the kind of `lorafx.program.frame.FrameInput`; else "".
        sizes: the shape in numbers, those that the graph was captured with.
        itemsize: bytes of an element; 0 where the result is no tensor.
        free: it moves no memory: an input, a view, the output.
        flops: of a matrix product or an attention; 0 for all else.
    """

    name: str
    op: str
    target: str
    line: str
    inputs: tuple[str, ...]
    value: str = ""
    path: str = ""
    cls: str = ""
    source: str = ""
    code: str = ""
    kind: str = ""
    sizes: tuple[int, ...] = ()
    itemsize: int = 0
    free: bool = False
    flops: int = 0


class SiteView(NamedTuple):
    """What became of a site in one stage.

    Attributes:
        cls: class of the site's module.
        k, n: input and output size of the delta.
        rank: room of a slot in its bank.
        flops: of the delta at that rank; 0 where they are not counted.
        rows: the proof of which owner each row has.
        form: "mark", "rewritten", "fused" or "packed".
        strategy: how the node is computed and why, after `plan`.
    """

    path: str
    cls: str
    k: int
    n: int
    rank: int
    flops: int
    rows: str
    form: str
    strategy: str


class RefusalView(NamedTuple):
    """Why LoRA cannot be applied at some sites: `lorafx.graph.context.Refusal`."""

    paths: tuple[str, ...]
    when: str
    reason: str


class Span(NamedTuple):
    """A part of a compilation, in seconds of `time.perf_counter`."""

    name: str
    start: float
    end: float


@dataclass(frozen=True, eq=False)
class StageView:
    """A graph after one pass.

    Attributes:
        edits: of the pass; None for the captured graph.
        end: when the pass had ended, by `time.perf_counter`.
        graphs: by name the nodes of the graph ("") and of the bodies that it calls.
        sites: of the nodes that serve any.
    """

    name: str
    edits: int | None
    seconds: float
    end: float
    graphs: tuple[tuple[str, tuple[NodeView, ...]], ...]
    sites: Mapping[NodeView, tuple[SiteView, ...]] = field(default_factory=dict)
    refusals: tuple[RefusalView, ...] = ()

    @property
    def nodes(self) -> int:
        return sum(len(nodes) for _, nodes in self.graphs)

    def exchanged(self, others: Mapping[NodeView, NodeView]) -> StageView:
        """The stage with other views in the place of its own."""
        graphs = tuple((name, tuple(others[node] for node in nodes)) for name, nodes in self.graphs)
        sites = {others[node]: served for node, served in self.sites.items() if node in others}
        return replace(self, graphs=graphs, sites=sites)


@dataclass(frozen=True, eq=False)
class GraphView:
    """One compiled graph.

    Attributes:
        reason: why it is no earlier graph's call.
        form: the kind of call that it serves.
        facts: further lines on it, such as what was outlined.
        sources: by file name what was generated for it.
        spans: what compiling it was, in any order; parts lie inside one another.
    """

    title: str
    reason: str
    stages: Sequence[StageView]
    spans: Sequence[Span] = ()
    form: Mapping[str, str] = field(default_factory=dict)
    facts: Sequence[str] = ()
    sources: Mapping[str, str] = field(default_factory=dict)


def exclusive(spans: Sequence[Span]) -> dict[str, float]:
    """Seconds by name, those of a part that lies inside another not counted in that one. In the
    order in which they began."""
    found: dict[str, float] = {}
    around: list[Span] = []
    for span in sorted(spans, key=lambda item: (item.start, -item.end)):
        while around and around[-1].end <= span.start:
            around.pop()
        seconds = span.end - span.start
        found[span.name] = found.get(span.name, 0.0) + seconds
        if around:
            found[around[-1].name] -= seconds
        around.append(span)
    return found
