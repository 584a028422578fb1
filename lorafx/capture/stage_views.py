"""The stages of a graph as plain values, for dumps and for the viewer (`lorafx.viewer`)."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import fx
from torch.fx.node import map_aggregate
from torch.utils.flop_counter import flop_registry

from lorafx.capture.graph_text import (
    GraphText,
    Printed,
    PrintedStage,
    graphs,
    innermost_path,
    target_text,
    users_line,
)
from lorafx.capture.node_names import NodeNames
from lorafx.graph.context import Context, SiteState, module_path
from lorafx.passes.outline.outline import INVOKE
from lorafx.passes.outline.regions import is_view
from lorafx.program.frame import FrameInput
from lorafx.torch_internals.compat import size_hint
from lorafx.viewer.stages import NodeView, RefusalView, SiteView, StageView


@dataclass(frozen=True, eq=False)
class KeptStage:
    """A stage as text, and as the viewer has it; both are put together where they are read.

    Attributes:
        name, edits, seconds, end, refusals: as of `StageView`.
        sites: of the nodes that serve any.
    """

    name: str
    edits: int | None
    seconds: float
    end: float
    printed: PrintedStage
    sites: Mapping[Printed, tuple[SiteView, ...]]
    refusals: tuple[RefusalView, ...]

    @cached_property
    def view(self) -> StageView:
        graphs = tuple(
            (name, tuple(node.seen.view(node) for node in nodes)) for name, nodes in self.printed
        )
        sites = {node.seen.view(node): served for node, served in self.sites.items()}
        return StageView(
            self.name, self.edits, self.seconds, self.end, graphs, sites, self.refusals
        )


class _Seen:
    """What a view of a node has beside what its line shows.

    Attributes:
        place: path and class of its module, where the metadata of the node do not say.
        kind, free: as of `NodeView`.
        hints: sizes in numbers, by expression; those of all nodes of the graph.
    """

    __slots__ = ("_view", "free", "hints", "kind", "place")

    def __init__(
        self,
        place: tuple[str, str] | None,
        kind: str,
        free: bool,
        hints: Mapping[Any, int | None],
    ) -> None:
        self.place = place
        self.kind = kind
        self.free = free
        self.hints = hints
        self._view: NodeView | None = None

    def view(self, printed: Printed) -> NodeView:
        """The view of the node that was printed so; the very same object each time."""
        if self._view is None:
            path, cls = self.place or (innermost_path(printed.stack), _class_of(printed.stack))
            self._view = NodeView(
                printed.name,
                printed.op,
                target_text(printed),
                printed.line,
                printed.inputs,
                printed.value,
                path,
                cls,
                *users_line(printed.trace or ""),
                self.kind,
                _sizes(printed, self.hints),
                0 if printed.dtype is None else printed.dtype.itemsize,
                self.free,
                _flops(printed, self.hints),
            )
        return self._view


class StageViews:
    """Keeps the stages of one graph, and until the last of them the graph's nodes.

    Nodes are called by their numbers in `names`: `lorafx.capture.dump` puts readable names there.

    Args:
        path_of: as of `GraphText`.
    """

    def __init__(
        self,
        names: NodeNames,
        inputs: Mapping[fx.Node, FrameInput],
        path_of: Callable[[fx.Node], str] = lambda node: "",
    ) -> None:
        self._text = GraphText(names.mark, path_of)
        self._inputs = inputs
        self._hints: dict[Any, int | None] = {}

    def stage(
        self,
        gm: fx.GraphModule,
        name: str,
        ctx: Context | None = None,
        *,
        edits: int | None = None,
        seconds: float = 0.0,
    ) -> KeptStage:
        """The graph of `gm` after the pass `name`, which has just ended."""
        end = time.perf_counter()
        paths = {} if ctx is None else _paths_of_calls(gm, ctx)
        found = []
        for key, graph in graphs(gm):
            nodes = []
            for node in graph.nodes:
                printed = self._text.printed(node)
                if printed.seen is None:
                    printed.seen = self._seen(node, printed, ctx, paths)
                nodes.append(printed)
            found.append((key, tuple(nodes)))
        sites = {} if ctx is None else self._sites(ctx)
        refusals = () if ctx is None else _refusals(ctx)
        return KeptStage(name, edits, seconds, end, tuple(found), sites, refusals)

    def _seen(
        self, node: fx.Node, printed: Printed, ctx: Context | None, paths: Mapping[fx.Node, str]
    ) -> _Seen:
        if printed.shape and not all(
            isinstance(size, int) or size in self._hints for size in printed.shape
        ):
            value: Any = node.meta.get("val", node.meta.get("example_value"))
            self._hints.update(zip(printed.shape, map(size_hint, value.shape), strict=True))
        place, item = None, self._inputs.get(node)
        if item is not None:
            place = _place(item)
        elif node in paths:
            place = paths[node] or module_path(node), _class_of(printed.stack)
        elif ctx is not None and node in ctx.states and not module_path(node):
            site = ctx.states[node][0].site
            place = site.path, type(site.module).__qualname__
        free = node.op in ("placeholder", "get_attr", "output") or is_view(node)
        kind = item.kind if item is not None else ""
        return _Seen(place, kind, free, self._hints)

    def _sites(self, ctx: Context) -> dict[Printed, tuple[SiteView, ...]]:
        found: dict[Printed, list[SiteView]] = {}
        for node, states in ctx.states.items():
            own = self._text.latest(node)
            sizes = () if own is None else _sizes(own, self._hints)
            served = [_site(ctx, sizes, state) for state in states]
            for home in ctx.homes.get(node, (node,)):
                printed = self._text.latest(home)
                if printed is not None:
                    found.setdefault(printed, []).extend(served)
        return {printed: tuple(served) for printed, served in found.items()}


def _place(item: FrameInput) -> tuple[str, str]:
    """Path and class of the module whose tensor an input is."""
    sites = item.group.sites if item.group is not None else item.sites
    if sites:
        return sites[0].path, type(sites[0].module).__qualname__
    return (item.holder.path, "") if item.holder is not None else ("", "")


def _paths_of_calls(gm: fx.GraphModule, ctx: Context) -> dict[fx.Node, str]:
    """Which module each call of an outlined body is."""
    paths = {item.name: iter(item.paths) for item in ctx.outlined}
    calls = gm.graph.find_nodes(op="call_function", target=INVOKE) if paths else []
    return {node: next(paths[node.args[1]], "") for node in calls if node.args[1] in paths}


def _site(ctx: Context, sizes: tuple[int, ...], state: SiteState) -> SiteView:
    site = state.site
    rank = ctx.program.home(site)[0].bank.slot_rank
    read = {"linear": site.in_features * len(site.parts), "embedding": 0}.get(site.eligible.kind)
    flops = 0
    if sizes and read is not None:  # x Aᵀ for each part, and the sum with B
        flops = 2 * math.prod(sizes[:-1]) * rank * (read + site.out_features)
    return SiteView(
        site.path,
        type(site.module).__qualname__,
        site.in_features,
        site.out_features,
        rank,
        flops,
        state.rows,
        state.form,
        state.strategy,
    )


def _refusals(ctx: Context) -> tuple[RefusalView, ...]:
    return tuple(RefusalView(item.paths, item.when, item.reason) for item in ctx.refusals)


def _class_of(stack: Mapping[Any, Any]) -> str:
    for _, cls in reversed(list(stack.values())):
        return cls.__qualname__ if isinstance(cls, type) else str(cls).rpartition(".")[2]
    return ""


def _sizes(printed: Printed, hints: Mapping[Any, int | None]) -> tuple[int, ...]:
    """The shape of a tensor in numbers; () where one of them depends on data."""
    sizes = [size if isinstance(size, int) else hints[size] for size in printed.shape or ()]
    return tuple(size for size in sizes if size is not None) if None not in sizes else ()


def _flops(printed: Printed, hints: Mapping[Any, int | None]) -> int:
    """torch's own count (`torch.utils.flop_counter`), where it has one for the operator.

    The formula is given shapes in numbers: to compare symbols would put guards on the graph.
    """
    formula = flop_registry.get(getattr(printed.target, "overloadpacket", None))
    if formula is None:
        return 0

    def shape(item: Any) -> Any:
        if not isinstance(item, Printed):
            return item
        sizes = _sizes(item, hints)
        if not sizes:
            raise ValueError("no tensor, or one of sizes that depend on data")
        return torch.Size(sizes)

    try:
        args, kwargs = map_aggregate((printed.args, printed.kwargs), shape)
        return int(formula(*args, **kwargs, out_val=torch.Size(_sizes(printed, hints))))
    except Exception:  # also a form of the operator that torch cannot count: nothing depends on it
        return 0
