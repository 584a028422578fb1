"""Where copies of something shared meet what requests own: each copy goes to its request.

Copies (n, …) of a tensor that is broadcast along the owner's dimension take that dimension's place:
index i along it gets the copy of the request that index i belongs to, and what is computed there
has the shape that it had. Two kinds of operators broadcast:

    expand, repeat    to the number of requests, which is a size of its own in the graph
    pointwise         to an operand that is owned; attention with a mask likewise
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import sympy
import torch
from torch import fx

from lorafx.op_arguments import bound, operand
from lorafx.ownership import contractions, pointwise
from lorafx.ownership.labels import Mixed, Own
from lorafx.ownership.propagate import called_by, rule_for
from lorafx.ownership.symbolic import ONE, Shape, divide
from lorafx.ownership.vectorize import Ended, Vectorizer

aten = torch.ops.aten


def by_size(node: fx.Node, vectorizer: Vectorizer) -> fx.Node | None:
    """The result of a shared `node` that repeats its operand once for each request, with copy i in
    repetition i; None where it does something else."""
    if not vectorizer.flow.batch.is_Symbol:
        return None  # another size may happen to be the same number
    packet = called_by(node)
    if packet is aten.expand:
        return _expanded(node, vectorizer)
    if packet is aten.repeat:
        return _repeated(node, vectorizer)
    return _broadcast(node, vectorizer) if rule_for(node.target)[0] is pointwise.pointwise else None


def _broadcast(node: fx.Node, vectorizer: Vectorizer) -> fx.Node | None:
    """Pointwise, against something shared that has an entry for each request (a mask of zeros)."""
    flow, new = vectorizer.flow, vectorizer.flow.shape(node)
    dims = [d for d, size in enumerate(new) if size == flow.batch]
    operands = {arg for arg in node.all_input_nodes if arg in vectorizer.copies}
    if len(dims) != 1 or any(
        _size_at(vectorizer, arg, dims[0], len(new)) != ONE for arg in operands
    ):
        return None
    placed = {arg: _placed(vectorizer, arg, len(new), dims[0]) for arg in operands}
    args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), lambda arg: placed.get(arg, arg))
    return vectorizer.emit(node.target, *args, **kwargs)


def _size_at(vectorizer: Vectorizer, arg: fx.Node, dim: int, ndim: int) -> sympy.Expr:
    """The size of an operand along a dimension of the `ndim` that it is broadcast to."""
    shape = vectorizer.flow.shape(arg)
    at = dim - ndim + len(shape)
    return shape[at] if at >= 0 else ONE


def _expanded(node: fx.Node, vectorizer: Vectorizer) -> fx.Node | None:
    flow, first = vectorizer.flow, operand(node)
    assert isinstance(first, fx.Node)
    new = flow.shape(node)
    dims = [d for d, size in enumerate(new) if size == flow.batch]
    dims = [d for d in dims if _size_at(vectorizer, first, d, len(new)) == ONE]
    if len(dims) != 1:
        return None
    line = _placed(vectorizer, first, len(new), dims[0])
    sizes = list(bound(node)["size"])
    sizes[dims[0]] = -1
    return vectorizer.emit(aten.expand.default, line, sizes)


def _repeated(node: fx.Node, vectorizer: Vectorizer) -> fx.Node | None:
    """Tiling along dimension d: index i of n·size belongs to repetition i // size."""
    flow, first, repeats = vectorizer.flow, operand(node), list(bound(node)["repeats"])
    assert isinstance(first, fx.Node)
    dims = [d for d, times in enumerate(repeats) if flow.size(times) == flow.batch]
    if len(dims) != 1:
        return None
    d, n = dims[0], len(repeats)
    copies = vectorizer.wide(first, n)
    repeats[d] = 1
    if any(flow.size(times) != ONE for times in repeats):
        copies = vectorizer.emit(aten.repeat.default, copies, [1, *repeats])
    order = [*range(1, d + 1), 0, *range(d + 1, n + 1)]
    copies = vectorizer.emit(aten.permute.default, copies, order)
    sizes = [vectorizer.size_of(copies, dim) for dim in (*range(d), *range(d + 2, n + 1))]
    return vectorizer.emit(aten.reshape.default, copies, [*sizes[:d], -1, *sizes[d:]])


def by_owner(node: fx.Node, vectorizer: Vectorizer) -> list[tuple[fx.Node, fx.Node]]:
    """For each operand of `node` with copies, what takes its place.

    Raises:
        Ended: it is not broadcast along the owner's dimension, or that is not known.
    """
    flow, label = vectorizer.flow, vectorizer.flow.labels[node]
    single = label[0] if isinstance(label, tuple) else label
    if isinstance(single, Mixed):
        raise Ended(node, f"it meets a tensor without proved ownership: {single.reason}")
    operands = [arg for arg in node.all_input_nodes if arg in vectorizer.copies]
    rule = rule_for(node.target)[0]
    shape = flow.shape(node)
    if rule is contractions.attention:
        args = bound(node)
        masks = [args.get(name) for name in ("attn_mask", "attn_bias")]
        query, key = flow.shape(args["query"]), flow.shape(args["key"])
        shape = (*query[:3], key[2])
        if any(arg not in masks for arg in operands):
            raise Ended(node, "it attends to something that all requests share")
    elif rule is not pointwise.pointwise or isinstance(label, tuple):
        raise Ended(node, "no rule gives each request its copy here")
    if not isinstance(single, Own) or single.perm is not None:
        raise Ended(node, f"no rule gives each request its copy along {single}")
    return [(arg, _given(node, vectorizer, arg, shape, single)) for arg in operands]


def _given(node: fx.Node, vectorizer: Vectorizer, arg: fx.Node, shape: Shape, own: Own) -> fx.Node:
    """The copies of `arg` along the owner's dimension of `shape`, to which it is broadcast."""
    flow, dim = vectorizer.flow, own.dim
    if _size_at(vectorizer, arg, dim, len(shape)) != ONE:
        raise Ended(node, f"sizes {flow.shape(arg)} are not broadcast along dimension {dim}")
    periods = divide(shape[dim], own.rows * flow.batch)
    if periods is None:
        raise Ended(node, f"{shape[dim]} is not proved to hold whole periods of {own}")
    line = _placed(vectorizer, arg, len(shape), dim)
    if own.rows == ONE and periods == ONE:
        return line
    # (…, periods, n, rows, …) in row-major order is the owner's dimension.
    times, rows = (vectorizer.emitter.size(size, vectorizer.before) for size in (periods, own.rows))
    if times is None or rows is None:
        raise Ended(node, f"the graph cannot compute the sizes of {own}")
    line = vectorizer.emit(
        aten.unsqueeze.default, vectorizer.emit(aten.unsqueeze.default, line, dim), dim + 2
    )
    sizes: list[Any] = [-1] * (len(shape) + 2)
    sizes[dim], sizes[dim + 2] = times, rows
    wide = vectorizer.emit(aten.expand.default, line, sizes)
    kept: Sequence[Any] = [
        vectorizer.size_of(wide, d) for d in (*range(dim), *range(dim + 3, len(shape) + 2))
    ]
    return vectorizer.emit(aten.reshape.default, wide, [*kept[:dim], -1, *kept[dim:]])


def _placed(vectorizer: Vectorizer, node: fx.Node, ndim: int, dim: int) -> fx.Node:
    """Copies of `node`, broadcast to `ndim` dimensions of which `dim` has one entry, with the
    copies along that dimension."""
    copies = vectorizer.emit(aten.squeeze.dim, vectorizer.wide(node, ndim), dim + 1)
    if dim == 0:
        return copies
    order = [*range(1, dim + 1), 0, *range(dim + 1, ndim)]
    moved = vectorizer.emit(aten.permute.default, copies, order)
    return vectorizer.emit(aten.clone.default, moved, memory_format=torch.contiguous_format)
