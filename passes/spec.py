"""What each pass over graphs promises of the graph that it leaves.

The first promises always hold. A pass that is switched off makes none, and a promise holds until
the end, or until the pass that ends it. A pass that breaks one, of lorafx or of a user, is named by
the driver's check (lorafx.program.promises) with the promise, before its numbers are looked at.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, fx

from lorafx.errors import LoweringError
from lorafx.kernels.ops.linear_ops import KERNELS
from lorafx.kernels.triton.build import plan_of
from lorafx.model.sites import Site
from lorafx.op_arguments import bound, op_of, operand
from lorafx.ownership.flow import place
from lorafx.passes.rescale import OWN_OPS, SCALE
from lorafx.program.bodies import bodies
from lorafx.program.context import (
    EXPERT_MARK,
    FUSED_OP,
    PLAIN_SITE_OPS,
    ROWS_OF,
    SITE_OP,
    SITE_OPS,
    Context,
    SiteState,
)
from lorafx.program.frame import fake_value
from lorafx.program.inputs import MADE
from lorafx.program.promises import Promise
from lorafx.program.row_maps import ALL_ALIKE
from lorafx.program.strategies import is_planned
from lorafx.torch_internals.graph_parts import OpOverload, tree_leaves

aten = torch.ops.aten

#: Ops that add a delta before `lower`.
_DELTA_OPS = SITE_OPS | {FUSED_OP}


@dataclass(frozen=True, eq=False)
class Passed:
    """A graph after a pass, and the captured graph's `output_values`."""

    gm: fx.GraphModule
    ctx: Context
    outputs: Sequence[Any]

    @property
    def graphs(self) -> list[fx.GraphModule]:
        return [self.gm]

    @cached_property
    def nodes(self) -> list[fx.Node]:
        """The nodes of the graph and of its bodies."""
        graphs = [self.gm.graph, *(body.graph for _, body in bodies(self.gm))]
        return [node for graph in graphs for node in graph.nodes]

    @cached_property
    def there(self) -> set[fx.Node]:
        return set(self.nodes)

    @cached_property
    def delta_ops(self) -> list[fx.Node]:
        return [node for node in self.nodes if node.target in _DELTA_OPS]

    @cached_property
    def states(self) -> dict[fx.Node, list[SiteState]]:
        """The sites by what computes them: nodes of the graph, calls of bodies, nodes of bodies."""
        found: dict[fx.Node, list[SiteState]] = {}
        for node, states in self.ctx.states.items():
            for home in self.ctx.homes.get(node, (node,)):
                found.setdefault(home, []).extend(states)
        return found

    def refused(self, *when: str) -> set[Site]:
        refusals = (item for item in self.ctx.refusals if item.when in when)
        return {site for item in refusals for site in item.sites}


def output_values(gm: fx.GraphModule) -> list[Any]:
    """The fake values of the graph's outputs."""
    output = next(node for node in gm.graph.nodes if node.op == "output")
    return [
        fake_value(item) if isinstance(item, fx.Node) else item
        for item in tree_leaves(output.args[0])
    ]


#: What promises are about.
_GRAPH, _NODES = attrgetter("graphs"), attrgetter("nodes")
_OPS, _SERVED = attrgetter("delta_ops"), attrgetter("ctx.states")


# --- always ---


def _malformed(passed: Passed, gm: fx.GraphModule) -> str:
    try:
        gm.graph.lint()
    except (RuntimeError, AssertionError) as error:
        return str(error)
    return ""


def _without_value(passed: Passed, node: fx.Node) -> str:
    if node.op != "call_function" or "val" in node.meta:
        return ""
    returns = not isinstance(node.target, OpOverload) or bool(node.target._schema.returns)
    return f"{node.name} has none" if returns else ""


def _other_outputs(passed: Passed, gm: fx.GraphModule) -> str:
    before, after = passed.outputs, output_values(gm)
    # Most passes keep the values themselves. Texts are made only now, since a pass may unify sizes.
    same = len(before) == len(after) and all(map(operator.is_, before, after))
    if same or (texts := _texts_of(before)) == _texts_of(after):
        return ""
    return f"they were {texts}, and are {_texts_of(after)}"


def _texts_of(values: Sequence[Any]) -> list[str]:
    return [
        f"{tuple(value.shape)} {value.dtype}" if isinstance(value, Tensor) else str(value)
        for value in values
    ]


def _lost(passed: Passed, node: fx.Node) -> str:
    homes = passed.ctx.homes.get(node, (node,))
    return "" if all(home in passed.there for home in homes) else _named(passed, node)


def _named(passed: Passed, node: fx.Node) -> str:
    """A node, with the paths of its sites."""
    states = passed.states.get(node) or passed.ctx.states.get(node, [])
    return f"{', '.join(state.site.path for state in states)} (node {node.name})".lstrip()


# --- match ---


def _of_no_site(passed: Passed, node: fx.Node) -> str:
    return "" if node in passed.states else f"{node.name}, made by {place(node)}, is of none"


def _weights(passed: Passed) -> Iterator[fx.Node]:
    """Weights whose every use is a site's: not those that a module without LoRA has, too, or whose
    module's call goes on after this graph. A handler may compute anything of its weight, and a hook
    that makes one leaves it on the module."""
    ctx = passed.ctx
    refused = passed.refused("always")
    for node, item in ctx.frame.by_node.items():
        apart = any(
            site in refused
            or site.eligible.handler is not None
            or id(site.module) in ctx.frame.callers
            for site in item.sites
        )
        found = item.kind == "weight" and item.part != MADE
        if found and not apart and not ctx.other_holders(node):
            yield node


def _without_delta(passed: Passed, weight: fx.Node) -> str:
    """Follow the weight until a site's op adds its delta. Other readers of the product before it,
    such as code of the module that keeps it, see the base's."""
    item, pending, seen = passed.ctx.frame.by_node[weight], [weight], {weight}
    while pending:
        node = pending.pop()
        if any(_adds_delta(passed, user, node, item.sites) for user in node.users):
            continue
        for user in node.users:
            if user.op == "output":
                return f"{item.label} reaches an output without it, by {node.name}"
            if user in seen or _multiplies_turned(user, node):
                continue
            if isinstance(fake_value(user), (Tensor, tuple, list)):  # no size
                seen.add(user)
                pending.append(user)
    return ""


def _adds_delta(passed: Passed, node: fx.Node, y: fx.Node, sites: Sequence[Site]) -> bool:
    """Whether `node` adds the delta of one of these sites to y, or multiplies by y, its weight."""
    if any(state.site in sites for state in passed.ctx.gated.get(node, ())):
        return y in node.all_input_nodes
    if not any(state.site in sites for state in passed.states.get(node, ())):
        return False
    call = bound(node) if node.target in _DELTA_OPS else {"y": y}  # a call of a body has it all
    return y in (call.get("y"), call.get("weight"))


def _multiplies_turned(node: fx.Node, weight: fx.Node) -> bool:
    """Whether `node` adds what an adapter makes of its inputs by this weight."""
    return node.target is OWN_OPS[SITE_OP] and bound(node)["weight"] is weight


def _left(op: OpOverload) -> Callable[[Passed, fx.Node], str]:
    return lambda _, node: f"{node.name} is left" if node.target is op else ""


# --- provenance, replace_rows, rescale ---


def _without_rows(passed: Passed, node: fx.Node) -> str:
    rows = bound(node)["rows"]
    if isinstance(rows, fx.Node) or 0 < rows < ALL_ALIKE:
        return ""
    refused = passed.refused("always", "mixed")
    sites = [state.site for state in passed.states.get(node, ())]
    return "" if rows == ALL_ALIKE and refused.issuperset(sites) else _named(passed, node)


def _with_own_rows(passed: Passed, node: fx.Node) -> str:
    return "" if bound(node).get("own") is None else _named(passed, node)


def _with_scale(passed: Passed, node: fx.Node) -> str:
    call = bound(node)
    return "" if all(call.get(name) is None for name in SCALE) else _named(passed, node)


# --- fuse, pack ---


def _fused(passed: Passed) -> list[fx.Node]:
    return passed.gm.graph.find_nodes(op="call_function", target=FUSED_OP)


def _of_another_weight(passed: Passed, node: fx.Node) -> str:
    weight, sites = bound(node)["weight"], _sites(passed, node)
    while weight.target is aten.slice.Tensor:
        weight = operand(weight)
    item = passed.ctx.frame.by_node.get(weight)
    if item is not None and item.kind == "packed":
        right = all(passed.ctx.program.home(site)[0] is item.group for site in sites)
    else:
        right = item is not None and set(sites) <= set(item.sites)
    return "" if right else f"{_named(passed, node)} takes {weight.name}"


def _of_other_columns(passed: Passed, node: fx.Node) -> str:
    columns = sum(site.out_features for site in _sites(passed, node))
    given = sum(bound(node)["sizes"])
    return "" if given == columns else f"{_named(passed, node)} gives {given} of {columns}"


def _no_siblings(passed: Passed, node: fx.Node) -> str:
    homes = [passed.ctx.program.home(site) for site in _sites(passed, node)]
    ranges = [group.ranges(index) for group, index in homes]
    siblings = [number for item in ranges for number in item.siblings]
    one = len({group for group, _ in homes}) == 1
    right = one and (len(homes) == 1 or siblings == [*bound(node)["siblings"]])
    return "" if right else _named(passed, node)


def _sites(passed: Passed, node: fx.Node) -> list[Site]:
    return [state.site for state in passed.states.get(node, ())]


# --- plan, lower ---


def _unplanned(passed: Passed, node: fx.Node) -> str:
    return "" if is_planned(node) else _named(passed, node)


def _to_be_lowered(passed: Passed, node: fx.Node) -> str:
    if passed.ctx.program.options.lowering == "reference" or node.target in PLAIN_SITE_OPS:
        return ""
    return _named(passed, node)


def _lorafx_ops(passed: Passed) -> list[fx.Node]:
    ops = ((node, op_of(node)) for node in passed.nodes if node.op == "call_function")
    return [node for node, op in ops if isinstance(op, OpOverload) and op.namespace == "lorafx"]


def _without_kernel(passed: Passed, node: fx.Node) -> str:
    op, call = op_of(node), bound(node)
    ids = [call.get("kernel"), *call.get("kernels", ())]
    for kernel in (item for item in ids if isinstance(item, int)):  # a convolution's is its size
        try:
            if kernel not in KERNELS:
                plan_of(kernel)
        except LoweringError:
            return f"{node.name} calls {op} with the kernel {kernel}, which is not loaded"
    return ""


#: What holds of any graph, Dynamo's and Inductor's too.
STRUCTURE: tuple[Promise[Passed], ...] = (Promise("the graph is well-formed", _GRAPH, _malformed),)
GRAPH_PROMISES: tuple[Promise[Passed], ...] = (
    *STRUCTURE,
    Promise("each node has a fake value", _NODES, _without_value),
    Promise("the outputs keep their shapes and dtypes", _GRAPH, _other_outputs),
    Promise("no site is lost", _SERVED, _lost),
    Promise("each op that adds a delta is a site's", _OPS, _of_no_site, "match"),
    Promise(
        "each use of a site's weight has its delta, or is refused",
        _weights,
        _without_delta,
        "match",
        "lower",
    ),
    Promise("no mark of experts is left", _NODES, _left(EXPERT_MARK), "match"),
    Promise(
        "each op that adds a delta has its rows, or refuses mixed batches",
        _OPS,
        _without_rows,
        "provenance",
    ),
    Promise("no mark of rows is left", _NODES, _left(ROWS_OF), "provenance"),
    Promise("no op takes an adapter's own rows", _OPS, _with_own_rows, "replace_rows"),
    Promise("no op takes scales or biases", _OPS, _with_scale, "rescale"),
    Promise("a fused op takes its sites' weight", _fused, _of_another_weight, "fuse"),
    Promise("a fused op gives all of its sites' columns", _fused, _of_other_columns, "fuse"),
    Promise("the sites of a fused op are siblings, in order", _fused, _no_siblings, "pack"),
    Promise("each op that adds a delta has a strategy", _SERVED, _unplanned, "plan", "lower"),
    Promise("no op is left to lower", _OPS, _to_be_lowered, "lower"),
    Promise("each op's kernel is loaded", _lorafx_ops, _without_kernel, "lower"),
)
