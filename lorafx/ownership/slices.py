"""Rules for operators that cut and join along one dimension.

Along any other dimension the owner is untouched. Along the owner dimension a piece must start at
a whole number of periods rows·B and be a whole number of them long: then index i of the piece
still belongs to request (i // rows) mod B.
"""

from __future__ import annotations

from collections.abc import Sequence

import sympy
import torch
from torch import fx

from lorafx.op_arguments import bound, index_of, operand
from lorafx.ownership.flow import Flow, Rule, each_output, of_owned, outputs, wrap
from lorafx.ownership.labels import Digit, Label, Own, Single
from lorafx.ownership.symbolic import ONE, divide, equal

aten, prims = torch.ops.aten, torch.ops.prims


def piece(node: fx.Node, flow: Flow, own: Own, start: sympy.Expr, size: sympy.Expr) -> Single:
    """The label of entries [start, start + size) of the owner dimension."""
    if own.perm is None and flow.whole(start, own) and flow.whole(size, own):
        return own
    return flow.lost(node, f"a part of the owner dimension that is not a whole period of {own}")


def is_full(node: fx.Node, flow: Flow, dim: int, step: object) -> bool:
    """The slice keeps the whole dimension."""
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
    if first is None or stride is None or first.is_negative:
        return flow.lost(node, "a part of the owner dimension")
    if stride == ONE:
        return piece(node, flow, label, first, size)
    # (start + step·i) // rows = i // (rows / step) where step divides rows and start < step.
    rows = divide(label.rows, stride)
    if rows is None or label.perm is not None or (first < stride) != sympy.true:
        return flow.lost(node, "a strided part of the owner dimension")
    return Own(dim, rows)


def sliced_digit(node: fx.Node, flow: Flow) -> Digit | None:
    digit, args = flow.digit(operand(node)), bound(node)
    if digit is None:
        return None
    dim = wrap(args["dim"], len(flow.shape(node)))
    return digit if dim != digit.dim or is_full(node, flow, dim, args.get("step", 1)) else None


@of_owned
def split(node: fx.Node, flow: Flow, label: Own) -> Label:
    """split, split_with_sizes, chunk and their kin: one label a piece."""
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
    return flow.lost(node, "a part of the owner dimension is overwritten")


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


def diagonal_written(node: fx.Node, flow: Flow) -> Label:
    """diagonal_scatter: self's diagonal over two dimensions replaced by src."""
    args, n = bound(node), len(flow.shape(node))
    label, src = flow.label(args["self"]), flow.label(args["src"])
    a, b = sorted(wrap(args[k], n) for k in ("dim1", "dim2"))
    if isinstance(src, Own):
        kept = [d for d in range(n) if d not in (a, b)]
        if src.dim >= len(kept):
            return flow.lost(node, "the owner dimension is written along a diagonal")
        src = src.at(kept[src.dim])
    label = flow.agree(node, [label, src])
    if isinstance(label, Own) and label.dim in (a, b):
        return flow.lost(node, "a diagonal over the owner dimension is overwritten")
    return label


@of_owned
def glu_halves(node: fx.Node, flow: Flow, label: Own) -> Label:
    """glu(dim): the two halves of a dimension meet."""
    half = flow.shape(node)[label.dim]
    dim = wrap(bound(node)["dim"], len(flow.shape(node)))
    return piece(node, flow, label, half, half) if label.dim == dim else label


RULES: dict[object, Rule] = {
    **dict.fromkeys((aten.slice, aten.narrow, aten.slice_copy), sliced),
    **dict.fromkeys(
        (
            aten.split, aten.split_with_sizes, aten.chunk, aten.unsafe_split, aten.tensor_split,
            aten.unsafe_split_with_sizes, aten.unsafe_chunk, aten.split_copy,
            aten.split_with_sizes_copy,
        ),
        split,
    ),
    **dict.fromkeys((aten.cat, aten.concat, prims.cat), concatenated),
    aten.stack: stacked,
    aten.slice_scatter: slice_written,
    aten.select_scatter: index_written,
    aten.diagonal_scatter: diagonal_written,
    aten.glu: glu_halves,
}  # fmt: skip
DIGITS = {aten.slice: sliced_digit, aten.narrow: sliced_digit}
