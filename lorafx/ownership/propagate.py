"""Propagation of row ownership over a functional ATen graph, one rule a node, in graph order.

    labels[node] = rule(labels of its inputs)

The tables of the rule files are looked up by operator, then the pointwise tag decides; an operator
that neither knows is loud: with a labelled input its result is Mixed and names it. Whatever a
rule claims, an owned dimension whose size is not a whole number of periods is given up.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping
from functools import cache

import torch
from torch import fx

from lorafx.ownership import (
    contractions,
    indexing,
    pointwise,
    reductions,
    singles,
    views,
)
from lorafx.ownership import site_rules as sites
from lorafx.ownership.flow import Flow, Rule, each_output, outputs
from lorafx.ownership.labels import Digit, Label, Mixed, One, Own, Pooled, Single
from lorafx.ownership.symbolic import ONE, BatchSymbols, equal
from lorafx.torch_internals.graph_parts import OpOverload

# Specific first; the first table that knows an operator decides.
TABLES = (sites, indexing, views, reductions, contractions, pointwise)
OPTIONAL = (contractions, reductions)
DIGIT_TABLES = (indexing, views, pointwise)
# Rules that accept Mixed inputs: the order of all requests' rows is Mixed, and some operators read
# only an input's shape.
TOLERANT = frozenset(
    {
        pointwise.unlabelled,
        pointwise.scalar_read,
        pointwise.copied,
        contractions.grouped,
        sites.expert_site,
        sites.rows_of,
        *indexing.RULES.values(),
    }
)
# Rules whose result holds no values of their labelled inputs.
FORGETFUL = frozenset({pointwise.unlabelled, pointwise.scalar_read, pointwise.copied})


def flow_through(
    graph: fx.Graph,
    seeds: Mapping[fx.Node, Label],
    batch: BatchSymbols,
    *,
    assume: bool = False,
    picks: Iterable[fx.Node] = (),
) -> Flow:
    """Labels of all nodes of a graph whose nodes carry fake tensors in meta["val"].

    Args:
        seeds: labels of the inputs; a tensor input without one is Mixed.
        assume: labels may rest on run-time checks (`Flow.fits`).
        picks: inputs (N,) whose values are indices of requests.

    Sites of a shared value have a copy of it for each request (`sites.copied_per_request`), unless
    a later site or result is then Mixed.
    """
    withheld: frozenset[fx.Node] = frozenset()
    while True:
        flow = _run(graph, seeds, Flow(batch, withheld=withheld, assume=assume, picks=picks))
        lost = [end for end in _ends(graph) if isinstance(flow.label(end), Mixed)]
        spoilt = ancestors(lost).intersection(flow.copied_sites) if flow.copied_sites else None
        if not spoilt:
            return flow
        withheld |= spoilt


def ancestors(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    """The nodes, and all that they are computed from."""
    found: set[fx.Node] = set()
    pending = list(nodes)
    while pending:
        node = pending.pop()
        if node not in found:
            found.add(node)
            pending.extend(node.all_input_nodes)
    return found


def _ends(graph: fx.Graph) -> list[fx.Node]:
    """The graph's sites and results."""
    rules = {n: sites.RULES.get(called_by(n)) for n in graph.nodes if n.op == "call_function"}
    ends = [node for node, rule in rules.items() if rule not in (None, sites.rows_of)]
    output = next(node for node in reversed(graph.nodes) if node.op == "output")
    return [*ends, *output.all_input_nodes]


def called_by(node: fx.Node) -> object:
    """The operator of a node without its overload."""
    return getattr(node.target, "overloadpacket", None)


def _run(graph: fx.Graph, seeds: Mapping[fx.Node, Label], flow: Flow) -> Flow:
    # Entry i of a vector t in `picks` is the request of row i of x[:, t].
    flow.digits.update({node: Digit(0, ONE, flow.batch, node) for node in flow.picks})
    for node in graph.nodes:
        if node in seeds:
            label = seeds[node]
        elif node.op == "placeholder":
            tensor = isinstance(node.meta.get("val"), torch.Tensor)
            label = flow.lost(node, "an input of unknown origin") if tensor else None
        elif node.op == "call_function":
            try:
                label, digit = called(node, flow), known_values(node, flow)
            except (AssertionError, AttributeError, LookupError, TypeError, ValueError) as error:
                why = f"its rule failed, {type(error).__name__}: {error}"
                label, digit = each_output(node, flow.lost(node, why)), None
            if digit is not None:
                flow.digits[node] = digit
        else:
            label = None
        flow.labels[node] = checked(node, flow, label)
    return flow


def called(node: fx.Node, flow: Flow) -> Label:
    if node.target is operator.getitem:
        return views.item_of(node, flow)
    if called_by(node) in views.VIEWS:
        views.learn_sizes(node, flow)
    labels = [flow.label(arg) for arg in node.all_input_nodes]
    rule, tolerant = rule_for(node.target)
    if rule is not sites.site and all(label is None for label in labels):
        return each_output(node, None)
    if any(isinstance(label, Pooled) for label in labels):
        return sites.read_of_pool(node, flow, labels, rule)
    apart = singles.taken_apart(node, flow)
    if apart is not None:
        return apart
    if rule not in FORGETFUL and any(isinstance(label, One) for label in labels):
        return singles.together(node, flow, labels)
    mixed = next((label for label in labels if isinstance(label, Mixed)), None)
    if mixed is not None and not tolerant:
        return each_output(node, mixed)
    if rule is None:
        return each_output(node, flow.lost(node, "no rule for this operator"))
    label = rule(node, flow)
    if label is None and rule not in FORGETFUL and any(item is not None for item in labels):
        return flow.lost(node, "an operand that the rule does not look at depends on requests")
    return label


@cache
def rule_for(target: object) -> tuple[Rule | None, bool]:
    """The rule for an operator, and whether it takes Mixed inputs."""
    if not isinstance(target, OpOverload):
        return None, False
    packet = target.overloadpacket
    for table in OPTIONAL:
        for (namespace, name), rule in table.OPTIONAL.items():
            if packet is getattr(getattr(torch.ops, namespace), name, None):
                return rule, rule in TOLERANT
    if torch.Tag.pointwise in target.tags and packet not in pointwise.RULES:
        return pointwise.pointwise, False  # also max(a, b), whose packet holds reductions
    for table in TABLES:
        if packet in table.RULES:
            return table.RULES[packet], table.RULES[packet] in TOLERANT
    return None, False


def known_values(node: fx.Node, flow: Flow) -> Digit | None:
    """The values of an integer tensor as a digit, if known."""
    if node.target is operator.getitem:
        return indexing.vector_order(node, flow)
    if not isinstance(node.target, OpOverload):
        return None
    packet = node.target.overloadpacket
    for table in DIGIT_TABLES:
        if packet in table.DIGITS:
            digit = table.DIGITS[packet](node, flow)
            if digit is not None:
                return digit
    return None


def checked(node: fx.Node, flow: Flow, label: Label) -> Label:
    """The label, or Mixed where the owner dimension is not a whole number of periods long."""
    values = outputs(node)
    if isinstance(label, tuple):
        return tuple(_checked(node, flow, v, item) for v, item in zip(values, label, strict=True))
    return _checked(node, flow, values[0], label)


def _checked(node: fx.Node, flow: Flow, value: object, label: Single) -> Single:
    if not isinstance(label, Own):
        return label
    shape = flow.sizes.shape(value) if isinstance(value, torch.Tensor) else ()
    if label.dim < len(shape):
        size = shape[label.dim]
        picked = label.perm in flow.picks and equal(size, flow.shape(label.perm)[0])
        if picked or flow.whole(size, label):
            return label
    return flow.lost(node, f"sizes {shape} are not proved to hold whole periods of {label}")
