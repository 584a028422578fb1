"""Stages: copies of a graph after each pass, kept on request.

Dumps, names, numeric verification, bisection and the viewer's page are functions of the stages.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

from torch import fx

from lorafx.config import Options
from lorafx.pass_order import CAPTURED
from lorafx.program.context import Context, Refusal, SiteState
from lorafx.program.frame import Frame, FrameInput
from lorafx.program.preparation import PassReport

#: The path of a graph's module ("" for the main graph), and a node's name.
Place = tuple[str, str]


@dataclass(frozen=True, eq=False)
class Stage:
    """A copy of a graph after a pass (`report` None: as captured), with its main graph's inputs and
    nodes' sites by name."""

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
        """The main graph (""), and the graphs of the modules that it calls, by path."""
        modules = self.graph.named_modules()
        return {path: item.graph for path, item in modules if isinstance(item, fx.GraphModule)}

    def paths(self, node: fx.Node) -> tuple[str, ...]:
        return tuple(state.site.path for state in self.sites.get(("", node.name), ()))

    @cached_property
    def input_count(self) -> int:
        return len(self.graph.graph.find_nodes(op="placeholder"))


def stage_of(gm: fx.GraphModule, ctx: Context, report: PassReport | None) -> Stage:
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
    inputs = zip(gm.graph.find_nodes(op="placeholder"), frame.inputs, strict=True)
    return Stage(copied(gm), inputs={node.name: item for node, item in inputs})


def inputs_of(frame: Frame) -> dict[str, FrameInput]:
    """The inputs by name. Banks looked up by a weight have its site."""
    found = {node.name: item for node, item in frame.by_node.items()}
    for (position, which, _), node in frame.extra_nodes.items():
        sites = frame.inputs[position].sites
        if found[node.name].kind == "bank" and which < len(sites):
            found[node.name] = replace(found[node.name], sites=(sites[which],))
    return found


def copied(gm: fx.GraphModule) -> fx.GraphModule:
    """A copy of the graph and the graphs that it calls, sharing fake values."""
    kept = fx.GraphModule(gm, copy.deepcopy(gm.graph))
    for name, child in kept.named_children():
        if isinstance(child, fx.GraphModule):
            setattr(kept, name, copied(child))
    return kept


def recorded(options: Options) -> bool:
    """Whether stages are kept during compilation."""
    return dump_folder(options) is not None or options.verify == "numeric"


def dump_folder(options: Options) -> Path | None:
    """The folder of dumps: `Options.dump`, else LORAFX_DUMP, else None."""
    folder = options.dump or os.environ.get("LORAFX_DUMP")
    return Path(folder) if folder else None
