"""Rules for operators that cut and join positions without reading values.

A piece of the owner dimension that starts at a whole number of periods rows·B, and is a whole
number of them long, keeps the label: index i of it still belongs to request (i // rows) mod B.
Other pieces, and joins of pieces, are known by their positions (`Runs`).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

import sympy
import torch
from torch import fx

from lorafx.op_arguments import bound, index_of, operand
from lorafx.ownership.flow import (
    Flow,
    Rule,
    called_by,
    each_output,
    of_owned,
    outputs,
    wrap,
)
from lorafx.ownership.labels import Digit, Label, One, Own, Single
from lorafx.ownership.runs import NOBODY, RowRun, Runs
from lorafx.ownership.symbolic import ONE, divide, equal

aten, prims = torch.ops.aten, torch.ops.prims


def piece(
    node: fx.Node,
    flow: Flow,
    label: Own,
    start: sympy.Expr,
    size: sympy.Expr,
    step: sympy.Expr = ONE,
) -> Single:
    """The label of `size` entries start, start + step, ... of the owner dimension."""
    whole = label.perm is None and step == ONE
    if whole and flow.whole(start, label) and flow.whole(size, label):
        return label
    runs = flow.positions(label, flow.shape(operand(node))[label.dim], label.rows)
    part = runs.part(start, size, step) if runs is not None and size != 0 else None
    if part is None:
        return flow.lost(node, f"a part of {label} that is not known")
    return flow.placed(label.dim, label.rows, part)


def is_full(node: fx.Node, flow: Flow, dim: int, step: object) -> bool:
    """Whether the slice keeps the whole dimension."""
    return step == 1 and equal(flow.shape(node)[dim], flow.shape(operand(node))[dim])


@of_owned
def sliced(node: fx.Node, flow: Flow, label: Own) -> Label:
    """slice(dim, start, end, step), also narrow(dim, start, length)."""
    args = bound(node)
    dim = wrap(args["dim"], len(flow.shape(operand(node))))
    step, start = args.get("step", 1), args.get("start")
    if label.dim != dim or is_full(node, flow, dim, step):
        return label
    first = flow.size(0 if start is None else start)
    size, stride = flow.shape(node)[dim], flow.size(step)
    if first is not None and first.is_negative and args.get("end") in (None, sys.maxsize):
        first = flow.shape(operand(node))[dim] - size  # the last entries
    if first is None or stride is None or first.is_negative:
        return flow.lost(node, "a part of the owner dimension")
    if stride == ONE:
        return piece(node, flow, label, first, size)
    # (start + step·i) // rows = i // (rows / step) where step divides rows and start < step.
    rows = divide(label.rows, stride)
    if rows is None or label.perm is not None or (first < stride) != sympy.true:
        return piece(node, flow, label, first, size, stride)
    return Own(dim, rows)


def sliced_digit(node: fx.Node, flow: Flow) -> Digit | None:
    digit, args = flow.digit(operand(node)), bound(node)
    if digit is None:
        return None
    dim = wrap(args["dim"], len(flow.shape(node)))
    return digit if dim != digit.dim or is_full(node, flow, dim, args.get("step", 1)) else None


@of_owned
def split(node: fx.Node, flow: Flow, label: Own) -> Label:
    """split, split_with_sizes, chunk and similar operators: a label for each piece."""
    dim = wrap(bound(node).get("dim", 0), len(flow.shape(operand(node))))
    if label.dim != dim:
        return each_output(node, label)
    start, labels = sympy.Integer(0), []
    for out in outputs(node):
        size = flow.sizes.shape(out)[dim] if out is not None else ONE
        labels.append(piece(node, flow, label, start, size))
        start = start + size
    return tuple(labels)


def item_of(node: fx.Node, flow: Flow) -> Label:
    """operator.getitem: one output of an operator with several."""
    label = flow.labels.get(operand(node))
    if isinstance(label, tuple):
        index = index_of(node)
        return label[index] if isinstance(index, int) else None
    return label


def concatenated(node: fx.Node, flow: Flow) -> Label:
    """cat: pieces agree; along the owner dimension unowned pieces are whole periods too."""
    placed = joined(node, flow)
    if placed is not None:
        return placed
    args = bound(node)
    # aten.cat skips legacy empty one-dimensional tensors.
    tensors: Sequence[fx.Node] = [
        t for t in args["tensors"] if len(flow.shape(t)) == len(flow.shape(node))
    ]
    dim = wrap(args["dim"], len(flow.shape(node)))
    label = flow.agree(node, [flow.label(t) for t in tensors])
    if not isinstance(label, Own) or label.dim != dim:
        return label
    whole = all(flow.whole(flow.shape(t)[dim], label) for t in tensors)
    if whole and (label.perm is None or len(tensors) == 1):
        return label
    return flow.lost(node, "joined along the owner dimension by parts that are not whole periods")


def joined(node: fx.Node, flow: Flow) -> Single:
    """The label of a cat or stack along the requests' dimension, of parts of the batch or of single
    requests; None where that is not so, or no positions changed."""
    args = bound(node)
    stack, dim = (
        called_by(node) is aten.stack,
        wrap(args.get("dim", 0), len(flow.shape(node))),
    )
    tensors = [t for t in args["tensors"] if len(flow.shape(t)) + stack == len(flow.shape(node))]
    labels = [flow.label(t) for t in tensors]
    owned = {label.rows for label in labels if isinstance(label, Own)}
    moved = any(isinstance(label, One) or getattr(label, "perm", None) for label in labels)
    misplaced = any(isinstance(label, Own) and (stack or label.dim != dim) for label in labels)
    if not moved or misplaced or len(owned) > 1:
        return None
    rows = owned.pop() if owned else ONE
    sizes = [ONE if stack else flow.shape(t)[dim] for t in tensors]
    found = [flow.positions(label, size, rows) for label, size in zip(labels, sizes, strict=True)]
    parts = [runs for runs in found if runs is not None]
    return flow.placed(dim, rows, Runs.joined(parts)) if len(parts) == len(found) else None


def stacked(node: fx.Node, flow: Flow) -> Label:
    args = bound(node)
    label = flow.agree(node, [flow.label(t) for t in args["tensors"]])
    dim = wrap(args["dim"], len(flow.shape(node)))
    return label.at(label.dim + (label.dim >= dim)) if isinstance(label, Own) else label


def slice_written(node: fx.Node, flow: Flow) -> Label:
    """slice_scatter(self, src, dim, start, end, step): src laid over a part of self."""
    args, shape = bound(node), flow.shape(node)
    src, dim = args["src"], wrap(args["dim"], len(shape))
    label = flow.agree(node, [flow.label(args["self"]), flow.label(src)])
    if not isinstance(label, Own) or label.dim != dim:
        return label
    start = flow.size(0 if args["start"] is None else args["start"])
    if args["step"] == 1 and start is not None and not start.is_negative:
        part = piece(node, flow, label, start, flow.shape(src)[dim])
        if part == label and flow.whole(shape[dim], label):
            return label
    return laid(node, flow) or flow.lost(node, "a part of the owner dimension is overwritten")


def laid(node: fx.Node, flow: Flow) -> Single:
    """The label of a buffer into which parts of the batch, or single requests, are laid along the
    requests' dimension by slice_scatter or select_scatter; None if it is not known."""
    args = bound(node)
    of_src, dim = flow.label(args["src"]), wrap(args["dim"], len(flow.shape(node)))
    rows = of_src.rows if isinstance(of_src, Own) else ONE
    runs = _laid(node, flow, dim, rows)
    return flow.placed(dim, rows, runs) if runs is not None else None


def _laid(node: fx.Node, flow: Flow, dim: int, rows: sympy.Expr) -> Runs | None:
    args = bound(node)
    source, of_src, length = args["src"], flow.label(args["src"]), flow.shape(node)[dim]
    one = called_by(node) is aten.select_scatter
    start = flow.size(args["index"] if one else args["start"] or 0)
    misplaced = isinstance(of_src, Own) and (one or of_src.dim != dim)
    if start is None or misplaced or args.get("step", 1) != 1:
        return None
    start = start + length if start.is_negative else start
    size = ONE if one else flow.shape(source)[dim]
    new, under = flow.positions(of_src, size, rows), _under(args["self"], flow, dim, rows)
    if new is None or under is None:
        return None
    before, after = under.part(sympy.S.Zero, start), under.part(start + size, length - start - size)
    return Runs.joined([before, new, after]) if before and after else None


def _under(buffer: fx.Node, flow: Flow, dim: int, rows: sympy.Expr) -> Runs | None:
    """The positions in a buffer, in part of which only one request's rows may lie yet."""
    label, size = flow.label(buffer), flow.shape(buffer)[dim]
    if label is None:
        return Runs((RowRun(NOBODY, size, sympy.S.Zero),))
    written = called_by(buffer) in (aten.select_scatter, aten.slice_scatter)
    if (
        isinstance(label, One)
        and written
        and wrap(bound(buffer)["dim"], len(flow.shape(buffer))) == dim
    ):
        return _laid(buffer, flow, dim, rows)
    return flow.positions(label, size, rows) if getattr(label, "dim", dim) == dim else None


def index_written(node: fx.Node, flow: Flow) -> Label:
    """select_scatter(self, src, dim, index): src laid over one index of self."""
    args = bound(node)
    dim = wrap(args["dim"], len(flow.shape(node)))
    label, src = flow.label(args["self"]), flow.label(args["src"])
    if isinstance(src, Own):
        src = src.at(src.dim + (src.dim >= dim))
    label = flow.agree(node, [label, src])
    if isinstance(label, Own) and label.dim == dim:
        return flow.lost(node, "one index of the owner dimension is overwritten")
    return label


@of_owned
def glu_halves(node: fx.Node, flow: Flow, label: Own) -> Label:
    """glu(dim): the two halves of a dimension meet."""
    half = flow.shape(node)[label.dim]
    dim = wrap(bound(node)["dim"], len(flow.shape(node)))
    if label.dim != dim or piece(node, flow, label, half, half) == label:
        return label
    return flow.lost(node, "the halves of the owner dimension meet")


RULES: dict[object, Rule] = {
    **dict.fromkeys((aten.slice, aten.narrow), sliced),
    **dict.fromkeys(
        (
            aten.split, aten.split_with_sizes, aten.chunk, aten.unsafe_split, aten.tensor_split,
            aten.unsafe_split_with_sizes, aten.unsafe_chunk,
        ),
        split,
    ),
    **dict.fromkeys((aten.cat, aten.concat, prims.cat), concatenated),
    aten.stack: stacked,
    aten.slice_scatter: slice_written,
    aten.select_scatter: index_written,
    aten.glu: glu_halves,
}  # fmt: skip
# Copies in place of views.
RULES |= {
    getattr(aten, f"{name}_copy"): RULES[getattr(aten, name)]
    for name in ("narrow", "slice", "split", "split_with_sizes")
}
DIGITS: dict[object, Callable] = dict.fromkeys((aten.slice, aten.narrow), sliced_digit)
