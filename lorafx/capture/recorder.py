"""Stages: copies of one graph as each pass left it, kept only where somebody asks for them.

Dumps, names, numeric verification, bisection and the viewer's page are functions of a list of
stages.
"""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

from torch import fx

from lorafx.config import Options
from lorafx.graph.context import Context, Refusal, SiteState
from lorafx.pass_order import CAPTURED
from lorafx.program.frame import Frame, FrameInput
from lorafx.program.pass_report import PassReport

#: A node: the path of the module whose graph holds it ("" for the graph itself), and its name.
Place = tuple[str, str]


@dataclass(frozen=True, eq=False)
class Stage:
    """A graph as one pass left it.

    Attributes:
        graph: a copy, whose nodes have the names of the original's.
        report: what the pass did; None for the captured graph.
        inputs: by name of the placeholder, of the graph itself.
        sites: those that a node serves.
    """

    graph: fx.GraphModule
    report: PassReport | None = None
    inputs: Mapping[str, FrameInput] = field(default_factory=dict)
    sites: Mapping[Place, tuple[SiteState, ...]] = field(default_factory=dict)
    refusals: tuple[Refusal, ...] = ()

    @property
    def name(self) -> str:
        return CAPTURED if self.report is None else self.report.name

    @cached_property
    def graphs(self) -> dict[str, fx.Graph]:
        """The graph (""), and those of the modules that it calls, by their paths."""
        modules = self.graph.named_modules()
        return {path: item.graph for path, item in modules if isinstance(item, fx.GraphModule)}

    def paths(self, node: fx.Node) -> tuple[str, ...]:
        """Of the sites that a node of the graph itself serves."""
        return tuple(state.site.path for state in self.sites.get(("", node.name), ()))

    @cached_property
    def input_count(self) -> int:
        """How many arguments it takes; later passes may add some."""
        return len(self.graph.graph.find_nodes(op="placeholder"))


def stage_of(gm: fx.GraphModule, ctx: Context, report: PassReport | None) -> Stage:
    """The stage after the pass that `report` is of."""
    modules = gm.named_modules()
    paths = {item.graph: path for path, item in modules if isinstance(item, fx.GraphModule)}
    sites: dict[Place, tuple[SiteState, ...]] = {}
    for node, states in ctx.states.items():
        plain = tuple(
            replace(state, use=None, packed_weight=None, packed_bias=None) for state in states
        )
        for home in ctx.homes.get(node, (node,)):
            place = paths[home.graph], home.name
            sites[place] = sites.get(place, ()) + plain
    return Stage(copied(gm), report, inputs_of(ctx.frame), sites, tuple(ctx.refusals))


def stage_of_base(gm: fx.GraphModule, frame: Frame) -> Stage:
    """The one stage of a graph that no pass sees."""
    inputs = zip(gm.graph.find_nodes(op="placeholder"), frame.inputs, strict=True)
    return Stage(copied(gm), inputs={node.name: item for node, item in inputs})


def inputs_of(frame: Frame) -> dict[str, FrameInput]:
    """The inputs by name. Banks that are looked up by a weight have its site."""
    found = {node.name: item for node, item in frame.by_node.items()}
    for (position, which, _), node in frame.extra_nodes.items():
        sites = frame.inputs[position].sites
        if found[node.name].kind == "bank" and which < len(sites):
            found[node.name] = replace(found[node.name], sites=(sites[which],))
    return found


def copied(gm: fx.GraphModule) -> fx.GraphModule:
    """The graph as it is now, with those that it calls. Fake values are shared."""
    kept = fx.GraphModule(gm, copy.deepcopy(gm.graph))
    for name, child in kept.named_children():
        if isinstance(child, fx.GraphModule):
            setattr(kept, name, copied(child))
    return kept


def recorded(options: Options) -> bool:
    """Whether the stages of graphs are wanted as they are compiled."""
    return dump_folder(options) is not None or options.verify == "numeric" or traces()


def traces() -> bool:
    """Whether somebody keeps torch's structured trace (TORCH_TRACE)."""
    return bool(logging.getLogger("torch.__trace").handlers)


def dump_folder(options: Options) -> Path | None:
    """Where dumps go: `Options.dump`, else LORAFX_DUMP, else nowhere. The one place that asks."""
    folder = options.dump or os.environ.get("LORAFX_DUMP")
    return Path(folder) if folder else None
