"""Propagation of row ownership over a functional ATen graph, one rule a node, in graph order.

    labels[node] = rule(labels of its inputs)

The tables of the rule files are looked up by operator, then the pointwise tag decides; an operator
that neither knows is loud: with a labelled input its result is Mixed and names it. Whatever a
rule claims, an owned dimension whose size is not a whole number of periods is given up.

Where Python took the batch apart, tensors belong to a single request:

    list(x), x[2], x.split(k), ...     One(b): every element belongs to request b
    cat([One(0), ..., One(B − 1)])     the requests again, in order
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache

import sympy
import torch
from torch import fx

from lorafx.op_arguments import bound, operand
from lorafx.ownership import batched, contractions, indexing, pieces, pointwise, reductions, views
from lorafx.ownership import site_rules as sites
from lorafx.ownership.flow import Flow, Rule, called_by, each_output, outputs, wrap
from lorafx.ownership.labels import Digit, Label, Mixed, One, Own, Pooled, Single
from lorafx.ownership.runs import Runs
from lorafx.ownership.symbolic import ONE, BatchSymbols, equal
from lorafx.torch_internals.graph_parts import OpOverload

aten, prims = torch.ops.aten, torch.ops.prims

# Specific first; the first table that knows an operator decides.
TABLES = (sites, indexing, views, pieces, reductions, batched, contractions, pointwise)
OPTIONAL = (contractions, reductions, pointwise)
DIGIT_TABLES = (indexing, views, pieces, pointwise)
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
#: Operators that take a batch apart into its requests, and that join them.
CUTS = (
    aten.select, aten.unbind, aten.slice, aten.narrow, aten.split, aten.split_with_sizes,
    aten.chunk, aten.unsafe_split, aten.unsafe_split_with_sizes, aten.unsafe_chunk,
    aten.tensor_split,
)  # fmt: skip
JOINS = (aten.cat, aten.concat, prims.cat, aten.stack)
LAID = (aten.select_scatter, aten.slice_scatter)


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


def ancestors(
    nodes: Iterable[fx.Node], through: Callable[[fx.Node], bool] = lambda _: True
) -> set[fx.Node]:
    """The nodes, and all that they are computed from; up to those for which `through` is false."""
    found: set[fx.Node] = set()
    pending = list(nodes)
    while pending:
        node = pending.pop()
        if node not in found:
            found.add(node)
            pending.extend(node.all_input_nodes if through(node) else ())
    return found


def _ends(graph: fx.Graph) -> list[fx.Node]:
    """The graph's sites and results."""
    rules = {n: sites.RULES.get(called_by(n)) for n in graph.nodes if n.op == "call_function"}
    ends = [node for node, rule in rules.items() if rule not in (None, sites.rows_of)]
    output = next(node for node in reversed(graph.nodes) if node.op == "output")
    return [*ends, *output.all_input_nodes]


def _run(graph: fx.Graph, seeds: Mapping[fx.Node, Label], flow: Flow) -> Flow:
    # Entry i of a vector t in `picks` is the request of row i of x[:, t].
    flow.digits.update({node: Digit(0, ONE, flow.batch, node) for node in flow.picks})
    for value in (value for node in graph.nodes for value in outputs(node)):
        if isinstance(value, torch.Tensor):
            flow.sizes.compare(value)
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
        return pieces.item_of(node, flow)
    if called_by(node) in views.VIEWS:
        views.learn_sizes(node, flow)
    labels = [flow.label(arg) for arg in node.all_input_nodes]
    rule, tolerant = rule_for(node.target)
    if rule not in (sites.site, sites.conv_site) and all(label is None for label in labels):
        return each_output(node, None)
    if any(isinstance(label, Pooled) for label in labels):
        return sites.read_of_pool(node, flow, labels, rule)
    apart = taken_apart(node, flow)
    if apart is not None:
        return apart
    if rule not in FORGETFUL and any(isinstance(label, One) for label in labels):
        return together(node, flow, labels)
    mixed = next((label for label in labels if isinstance(label, Mixed)), None)
    if mixed is not None and not tolerant:
        return each_output(node, mixed)
    if rule is None:
        return each_output(node, flow.lost(node, "no rule for this operator"))
    label = rule(node, flow)
    shared = label is None or (isinstance(label, tuple) and not any(label))
    if shared and rule not in FORGETFUL and any(item is not None for item in labels):
        lost = flow.lost(node, "an operand that the rule does not look at depends on requests")
        return each_output(node, lost)
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
    if any(torch.Tag.pointwise in getattr(packet, name).tags for name in packet.overloads()):
        return pointwise.pointwise, False  # torch has not tagged all overloads
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
        if isinstance(label.perm, Runs):
            known = equal(size, label.perm.size)
        else:
            vector = label.perm is not None and len(flow.shape(label.perm)) == 1
            known = vector and equal(size, flow.shape(label.perm)[0])
        if known or flow.whole(size, label):
            return label
    return flow.lost(node, f"sizes {shape} are not proved to hold whole periods of {label}")


def request_of(
    flow: Flow, label: Own, length: sympy.Expr, first: sympy.Expr, size: sympy.Expr = ONE
) -> One | None:
    """The request of entries [first, first + size) of the owner dimension, which has `length`, if
    it is only one."""
    runs = flow.positions(label, length, label.rows)
    part = runs.part(first, size) if runs is not None and not first.is_negative else None
    if part is None or size == 0:
        return None
    one_period = label.perm is None and equal(length, label.rows * flow.batch)
    request = flow.only(part, label.rows, one_period=one_period)
    return None if request is None else One(request)


def taken_apart(node: fx.Node, flow: Flow) -> Label | None:
    """The labels of parts of the owner dimension within a single request each; else None."""
    packet = getattr(node.target, "overloadpacket", None)
    if packet not in CUTS:
        return None
    args, label = bound(node), flow.label(operand(node))
    shape = flow.shape(operand(node))
    if not isinstance(label, Own) or label.dim != wrap(args.get("dim", 0), len(shape)):
        return None
    length = shape[label.dim]
    if packet in (aten.slice, aten.narrow):
        first = flow.size(0 if args.get("start") is None else args["start"])
        stepped = args.get("step", 1) != 1 or equal(flow.shape(node)[label.dim], length)
        if stepped or first is None:
            return None
        return request_of(flow, label, length, first, flow.shape(node)[label.dim])
    if packet is aten.select:
        index = flow.size(args["index"])
        if index is None:
            return None
        return request_of(flow, label, length, index + length if index.is_negative else index)
    found: list[Single] = []
    at: sympy.Expr = sympy.S.Zero
    for out in outputs(node):
        size = ONE if packet is aten.unbind else flow.sizes.shape(out)[label.dim]  # type: ignore[arg-type]
        request = request_of(flow, label, length, at, size)
        if request is None:
            return None
        found.append(request)
        at = at + size
    return tuple(found)


def together(node: fx.Node, flow: Flow, labels: Sequence[Single]) -> Label:
    """The label of a result of operands some of which belong to a single request."""
    known = {label for label in labels if label is not None}
    if len(known) == 1:
        return each_output(node, known.pop())
    if called_by(node) in (*JOINS, *LAID):
        placed = pieces.laid(node, flow) if called_by(node) in LAID else pieces.joined(node, flow)
        if placed is not None:
            return placed
    mixed = next((label for label in labels if isinstance(label, Mixed)), None)
    why = "tensors of single requests meet others"
    return each_output(node, flow.lost(node, why) if mixed is None else mixed)
