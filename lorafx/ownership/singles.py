"""Rules for tensors of a single request, where Python took the batch apart.

    list(x), x[2], x.split(k), ...     One(b): every element belongs to request b
    cat([One(0), ..., One(B − 1)])     the requests again, in order

B must be a number in the graph. Results of tensors of a single request are that request's, whatever
the operator.
"""

from __future__ import annotations

from collections.abc import Sequence

import sympy
import torch
from torch import fx

from lorafx.op_arguments import bound, operand
from lorafx.ownership.flow import Flow, each_output, outputs, wrap
from lorafx.ownership.labels import Label, Mixed, One, Own, Single
from lorafx.ownership.symbolic import ONE, equal

aten, prims = torch.ops.aten, torch.ops.prims


def request_of(flow: Flow, label: Own, first: sympy.Expr, size: sympy.Expr = ONE) -> One | None:
    """The request of entries [first, first + size) of the owner dimension, if only one."""
    numbers = (first, size, label.rows, flow.batch)
    if label.perm is not None or not all(n.is_Integer for n in numbers):
        return None
    begin, count, rows, batch = (int(n) for n in numbers)
    owners = {(begin + i) // rows % batch for i in range(count)}
    return One(owners.pop()) if begin >= 0 and len(owners) == 1 else None


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
        return request_of(flow, label, first, flow.shape(node)[label.dim])
    if packet is aten.select:
        index = flow.size(args["index"])
        if index is None or not (index.is_Integer and length.is_Integer):
            return None
        return request_of(flow, label, index if index >= 0 else index + length)
    found: list[Single] = []
    at: sympy.Expr = sympy.S.Zero
    for out in outputs(node):
        size = ONE if packet is aten.unbind else flow.sizes.shape(out)[label.dim]  # type: ignore[arg-type]
        request = request_of(flow, label, at, size)
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
    packet = getattr(node.target, "overloadpacket", None)
    if packet in JOINS and all(isinstance(label, One) for label in labels):
        joined = _joined(node, flow, packet is aten.stack)
        if joined is not None:
            return joined
    mixed = next((label for label in labels if isinstance(label, Mixed)), None)
    why = "tensors of single requests meet others"
    return each_output(node, flow.lost(node, why) if mixed is None else mixed)


def _joined(node: fx.Node, flow: Flow, stacked: bool) -> Own | None:
    """All requests' parts joined in order, of equal length."""
    args = bound(node)
    dim = wrap(args.get("dim", 0), len(flow.shape(node)))
    lengths: dict[int, sympy.Expr] = {}
    order: list[int] = []
    for tensor in args["tensors"]:
        shape, label = flow.shape(tensor), flow.label(tensor)
        if not isinstance(label, One) or (not stacked and len(shape) != len(flow.shape(node))):
            return None
        if not order or order[-1] != label.request:
            order.append(label.request)
        size = ONE if stacked else shape[dim]
        lengths[label.request] = lengths.get(label.request, sympy.S.Zero) + size
    if not flow.batch.is_Integer or order != list(range(int(flow.batch))):
        return None
    rows = lengths[0]
    return Own(dim, rows) if all(equal(rows, other) for other in lengths.values()) else None


CUTS = (
    aten.select, aten.unbind, aten.slice, aten.narrow, aten.split, aten.split_with_sizes,
    aten.chunk, aten.unsafe_split, aten.unsafe_split_with_sizes, aten.unsafe_chunk,
    aten.tensor_split,
)  # fmt: skip
JOINS = (aten.cat, aten.concat, prims.cat, aten.stack)
