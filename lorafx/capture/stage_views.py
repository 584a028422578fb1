"""The stages of a graph as plain values, for dumps and for the viewer (`lorafx.viewer`)."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import flop_registry

from lorafx.capture.graph_text import (
    GraphText,
    Printed,
    PrintedStage,
    graphs,
    target_text,
    users_line,
)
from lorafx.capture.node_names import NodeNames
from lorafx.compat import size_hint
from lorafx.graph.context import Context, SiteState
from lorafx.graph.graph_nodes import module_path
from lorafx.passes.outline.outline import INVOKE
from lorafx.passes.outline.regions import is_view
from lorafx.program.frame import FrameInput
from lorafx.viewer.stages import NodeView, RefusalView, SiteView, StageView


class KeptStage(NamedTuple):
    """A stage as text, and as the viewer has it."""

    printed: PrintedStage
    view: StageView


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
        self._names = names
        self._inputs = inputs
        self._sources: dict[str, tuple[str, str]] = {}

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
        printed = self._text.stage(gm)
        paths = {} if ctx is None else _paths_of_calls(gm, ctx)
        found = [
            (key, self._nodes(graph, nodes, ctx, paths))
            for (key, graph), (_, nodes) in zip(graphs(gm), printed, strict=True)
        ]
        sites = {} if ctx is None else self._sites(ctx)
        refusals = () if ctx is None else _refusals(ctx)
        view = StageView(name, edits, seconds, end, tuple(found), sites, refusals)
        return KeptStage(printed, view)

    def _nodes(
        self,
        graph: fx.Graph,
        printed: Sequence[Printed],
        ctx: Context | None,
        paths: Mapping[fx.Node, str],
    ) -> tuple[NodeView, ...]:
        found = []
        for node, own in zip(graph.nodes, printed, strict=True):
            if own.view is None:
                own.view = self._view(node, own, ctx, paths)
            found.append(own.view)
        return tuple(found)

    def _view(
        self, node: fx.Node, printed: Printed, ctx: Context | None, paths: Mapping[fx.Node, str]
    ) -> NodeView:
        value = node.meta.get("val", node.meta.get("example_value"))
        path, cls = paths.get(node) or module_path(node), _class_of(node)
        if not path and ctx is not None and node in ctx.states:
            site = ctx.states[node][0].site
            path, cls = site.path, type(site.module).__qualname__
        source, code = self._source(node)
        item = self._inputs.get(node)
        if item is not None:
            path, cls = _place(item)
        free = node.op in ("placeholder", "get_attr", "output") or is_view(node)
        return NodeView(
            node.name if node.op == "output" else self._names.mark(node),  # no line has its name
            node.op,
            target_text(node),
            printed.line,
            tuple(map(self._names.mark, node.all_input_nodes)),
            printed.value,
            path,
            cls,
            source,
            code,
            item.kind if item is not None else "",
            _sizes(value),
            value.dtype.itemsize if isinstance(value, Tensor) else 0,
            free,
            _flops(node),
        )

    def _source(self, node: fx.Node) -> tuple[str, str]:
        trace = node.meta.get("stack_trace")
        if not isinstance(trace, str):
            return "", ""
        if trace not in self._sources:
            self._sources[trace] = users_line(trace)
        return self._sources[trace]

    def _sites(self, ctx: Context) -> dict[NodeView, tuple[SiteView, ...]]:
        found: dict[NodeView, list[SiteView]] = {}
        for node, states in ctx.states.items():
            served = [_site(ctx, node, state) for state in states]
            for home in ctx.homes.get(node, (node,)):
                view = self._text.view_of(home)
                if view is not None:
                    found.setdefault(view, []).extend(served)
        return {view: tuple(served) for view, served in found.items()}


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


def _site(ctx: Context, node: fx.Node, state: SiteState) -> SiteView:
    site = state.site
    rank = ctx.program.home(site)[0].bank.slot_rank
    sizes = _sizes(node.meta.get("val"))
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


def _class_of(node: fx.Node) -> str:
    stack = node.meta.get("nn_module_stack") or {}
    for _, cls in reversed(list(stack.values())):
        return cls.__qualname__ if isinstance(cls, type) else str(cls).rpartition(".")[2]
    return ""


def _sizes(value: Any) -> tuple[int, ...]:
    """The shape of a tensor in numbers; () where one of them depends on data."""
    if not isinstance(value, Tensor):
        return ()
    sizes = [size_hint(size) for size in value.shape]
    return () if None in sizes else tuple(size for size in sizes if size is not None)


def _flops(node: fx.Node) -> int:
    """torch's own count (`torch.utils.flop_counter`), where it has one for the operator.

    The formula is given shapes in numbers: to compare symbols would put guards on the graph.
    """
    formula = flop_registry.get(getattr(node.target, "overloadpacket", None))
    if formula is None:
        return 0
    sizes = {source: _sizes(source.meta.get("val")) for source in node.all_input_nodes}
    if not all(sizes.values()):
        return 0
    shapes = {source: torch.Size(found) for source, found in sizes.items()}
    args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), shapes.__getitem__)
    result = pytree.tree_map(lambda item: torch.Size(_sizes(item)), node.meta.get("val"))
    try:
        return int(formula(*args, **kwargs, out_val=result))
    except Exception:  # a form of the operator that torch cannot count: nothing depends on it
        return 0
