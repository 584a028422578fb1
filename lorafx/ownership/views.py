"""Rules for operators that move positions without reading values.

Views relocate the digit of the position (`symbolic.reshaped`); permutations renumber dimensions;
pads and rolls must not touch the owner dimension. The rules serve ownership and known index values
(`Digit`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeVar

import torch
from torch import fx

from lorafx.op_arguments import bound, operand
from lorafx.ownership.flow import (
    Flow,
    Rule,
    each_output,
    of_owned,
    wrap,
    wrap_all,
)
from lorafx.ownership.labels import Digit, Label, Own, Single
from lorafx.ownership.runs import Runs
from lorafx.ownership.symbolic import ONE, divide, equal, never_negative, product, reshaped

aten, prims = torch.ops.aten, torch.ops.prims


Placed = TypeVar("Placed", Own, Digit)
Renumber = Callable[[fx.Node, Flow, int], "int | None"]


def view_of(node: fx.Node, flow: Flow, carried: Placed) -> Placed | None:
    """Row-major reshape of the first argument into the node's shape."""
    modulus = carried.modulus if isinstance(carried, Digit) else flow.batch
    old, new = flow.shape(operand(node)), flow.shape(node)
    moved = reshaped(carried.dim, carried.rows, modulus, old, new, carried.perm is not None)
    return replace(carried, dim=moved[0], rows=moved[1]) if moved is not None else None


@of_owned
def view(node: fx.Node, flow: Flow, label: Own) -> Label:
    moved: Single = view_of(node, flow, label)
    if moved is None and isinstance(label.perm, Runs):
        moved = view_of_runs(node, flow, label, label.perm)
    if moved is None:
        old, new = flow.shape(operand(node)), flow.shape(node)
        return flow.lost(node, f"{label} cannot be followed from sizes {old} to {new}")
    return moved


def view_of_runs(node: fx.Node, flow: Flow, label: Own, runs: Runs) -> Single:
    """Merging the owner dimension with those behind it, or splitting it; None for other views."""
    old, new = flow.shape(operand(node)), flow.shape(node)
    for dim, size in enumerate(new):
        if not equal(product(new[:dim]), product(old[: label.dim])):
            continue
        if (m := divide(size, old[label.dim])) is not None:
            scaled = runs.scaled(m)
            return flow.placed(dim, label.rows * m, scaled) if scaled is not None else None
        if (m := divide(old[label.dim], size)) is not None:
            grouped = runs.grouped(m, label.rows)
            return flow.placed(dim, *grouped) if grouped is not None else None
    return None


def learn_sizes(node: fx.Node, flow: Flow) -> None:
    """Learn the sizes in a view's arguments, for which tracing may have longer expressions such as
    ((B·H·W) // (H·W)) // ... for 4, or for -1."""
    args = bound(node)
    target = args["size"] if "size" in args else args.get("shape")
    if not isinstance(target, (list, tuple)):
        return
    sizes = [flow.size(size) for size in target]
    open_dim = None
    for dim, size in enumerate(sizes):
        if size is None:
            return
        if size == -1:
            open_dim = dim
        else:
            flow.sizes.learn(flow.shape(node)[dim], size)
    if open_dim is not None:
        known = product(size for dim, size in enumerate(sizes) if dim != open_dim)
        exact = divide(product(flow.shape(operand(node))), known)
        if exact is not None:
            flow.sizes.learn(flow.shape(node)[open_dim], exact)


def view_digit(node: fx.Node, flow: Flow) -> Digit | None:
    digit = flow.digit(operand(node))
    return view_of(node, flow, digit) if digit is not None else None


def renumbering(renumber: Renumber, why: str) -> tuple[Rule, Callable]:
    """The rules, for labels and for digits, of an operator that renumbers dimensions."""

    @of_owned
    def rule(node: fx.Node, flow: Flow, label: Own) -> Label:
        dim = renumber(node, flow, label.dim)
        return each_output(node, flow.lost(node, why) if dim is None else label.at(dim))

    def digits(node: fx.Node, flow: Flow) -> Digit | None:
        digit = flow.digit(operand(node))
        dim = renumber(node, flow, digit.dim) if digit is not None else None
        return digit.at(dim) if digit is not None and dim is not None else None

    return rule, digits


def ndim(node: fx.Node, flow: Flow) -> int:
    return len(flow.shape(operand(node)))


def permuted(node: fx.Node, flow: Flow, dim: int) -> int | None:
    args, n = bound(node), ndim(node, flow)
    dims = args["dims"] if "dims" in args else args["permutation"]
    return [wrap(d, n) for d in dims].index(dim)


def transposed(node: fx.Node, flow: Flow, dim: int) -> int | None:
    args, n = bound(node), ndim(node, flow)
    names = ("dim0", "dim1") if "dim0" in args else ("axis0", "axis1")
    a, b = (wrap(args[name], n) for name in names)
    return {a: b, b: a}.get(dim, dim)


def matrix_transposed(node: fx.Node, flow: Flow, dim: int) -> int | None:
    """t(): transposes a matrix, keeps a vector."""
    return 1 - dim if ndim(node, flow) == 2 else dim


def unsqueezed(node: fx.Node, flow: Flow, dim: int) -> int | None:
    at = wrap(bound(node)["dim"], ndim(node, flow) + 1)
    return dim + (dim >= at)


def squeezed(node: fx.Node, flow: Flow, dim: int) -> int | None:
    """An owner dimension has at least B > 1 entries and is never squeezed away."""
    args, shape = bound(node), flow.shape(operand(node))
    dims = args.get("dim", args.get("dimensions"))
    named = wrap_all(dims, len(shape))
    dropped = [d for d in sorted(named) if shape[d] == ONE]
    if len(shape) - len(dropped) != len(flow.shape(node)):
        return None  # a size is one in the traced call only
    return None if dim in dropped else dim - sum(d < dim for d in dropped)


def expanded(node: fx.Node, flow: Flow, dim: int) -> int | None:
    return dim + len(flow.shape(node)) - ndim(node, flow)


def broadcast_in_dim(node: fx.Node, flow: Flow, dim: int) -> int | None:
    return bound(node)["broadcast_dimensions"][dim]


def selected(node: fx.Node, flow: Flow, dim: int) -> int | None:
    at = wrap(bound(node)["dim"], ndim(node, flow))
    return None if dim == at else dim - (dim > at)


def diagonal(node: fx.Node, flow: Flow, dim: int) -> int | None:
    args, n = bound(node), ndim(node, flow)
    a, b = sorted(wrap(args[k], n) for k in ("dim1", "dim2"))
    if dim in (a, b):  # its index goes along the result's last dimension
        return None if args["offset"] else n - 2
    return dim - (dim > a) - (dim > b)


def untouched(name: str) -> Renumber:
    """Dimensions keep their numbers; the argument `name` must not name the owner's."""

    def renumber(node: fx.Node, flow: Flow, dim: int) -> int | None:
        return None if dim in wrap_all(bound(node)[name], ndim(node, flow)) else dim

    return renumber


def padded(node: fx.Node, flow: Flow, dim: int) -> int | None:
    """constant_pad_nd: pairs (before, after), last dimension first."""
    pad = bound(node)["pad"]
    back = ndim(node, flow) - 1 - dim
    sides = pad[2 * back : 2 * back + 2]
    return dim if all(flow.size(side) == 0 for side in sides) else None


def last_dims_padded(node: fx.Node, flow: Flow, dim: int) -> int | None:
    """Reflection and replication pads work on the last len(padding) / 2 dimensions."""
    return dim if dim < ndim(node, flow) - len(bound(node)["padding"]) // 2 else None


@of_owned
def repeated(node: fx.Node, flow: Flow, label: Own) -> Label:
    """Tiling: i goes to i + j·size, the same request, since size is a whole number of periods."""
    args, old = bound(node), flow.shape(operand(node))
    repeats = args["repeats"] if "repeats" in args else args["dims"]
    dim = label.dim + len(flow.shape(node)) - len(old)
    times = repeats[dim - len(flow.shape(node))] if len(repeats) >= len(old) - label.dim else 1
    if label.perm is not None and flow.size(times) != ONE:
        return flow.lost(node, "permuted rows are tiled")
    return label.at(dim)


@of_owned
def repeat_interleaved(node: fx.Node, flow: Flow, label: Own) -> Label:
    """repeat_interleave by a number k: rows become rows·k along that dimension."""
    args = bound(node)
    k, dim = flow.size(args.get("repeats")), args.get("dim")
    if dim is not None and wrap(dim, ndim(node, flow)) != label.dim:
        return label
    if k is None or label.perm is not None or (dim is None and ndim(node, flow) != 1):
        return flow.lost(node, "rows are repeated a number of times that is not known")
    return Own(label.dim, label.rows * k)


@of_owned
def flipped(node: fx.Node, flow: Flow, label: Own) -> Label:
    args, sizes = bound(node), flow.shape(node)
    if label.dim not in wrap_all(args["dims"], len(sizes)):
        return label
    runs = flow.positions(label, sizes[label.dim], label.rows)
    if runs is None:
        return flow.lost(node, "rows in an order that is not known are reversed")
    return flow.placed(label.dim, label.rows, runs.reversed())


@of_owned
def as_strided(node: fx.Node, flow: Flow, label: Own) -> Label:
    """Only windows of a dense input inside a step of its leading owner dimension."""
    args = bound(node)
    value = args["self"].meta["val"]
    shape, stride = flow.sizes.shape(value), flow.sizes.strides(value)
    dense = all(equal(s, product(shape[d + 1 :])) for d, s in enumerate(stride))
    offset = args.get("storage_offset")
    size = flow.numbers(args["size"])
    steps = flow.numbers(args["stride"])
    fits = (
        dense
        and label.dim == 0
        and (offset is None or flow.size(offset) == 0)
        and value.storage_offset() == 0
        and bool(size and steps)
        and size[0] == shape[0]
        and equal(steps[0], stride[0])
    )
    if fits:
        reach = sum((s - 1) * step for s, step in zip(size[1:], steps[1:], strict=True))
        if never_negative(stride[0] - 1 - reach):
            return label
    return flow.lost(node, "a strided window that is not proved to stay within one row")


MOVES: dict[object, tuple[Renumber, str]] = {
    **dict.fromkeys((aten.permute, prims.transpose), (permuted, "")),
    **dict.fromkeys((aten.transpose, aten.swapaxes, aten.swapdims), (transposed, "")),
    aten.t: (matrix_transposed, ""),
    aten.unsqueeze: (unsqueezed, ""),
    **dict.fromkeys((aten.squeeze, prims.squeeze), (squeezed, "the owner dimension is dropped")),
    **dict.fromkeys((aten.expand, aten.broadcast_to, aten.expand_as), (expanded, "")),
    prims.broadcast_in_dim: (broadcast_in_dim, ""),
    aten.select: (selected, "one index of the owner dimension is taken for all requests"),
    aten.unbind: (selected, "the owner dimension is taken apart"),
    aten.diagonal: (diagonal, "a diagonal over the owner dimension"),
    aten.unfold: (untouched("dimension"), "windows over the owner dimension"),
    **dict.fromkeys((aten.flip, aten.roll), (untouched("dims"), "the owner dimension is moved")),
    **dict.fromkeys(
        (prims.rev, aten.rot90), (untouched("dims"), "the owner dimension is reversed")
    ),
    aten.constant_pad_nd: (padded, "the owner dimension is padded"),
    **dict.fromkeys(
        (
            aten.reflection_pad1d, aten.reflection_pad2d, aten.reflection_pad3d,
            aten.replication_pad1d, aten.replication_pad2d, aten.replication_pad3d,
        ),
        (last_dims_padded, "the owner dimension is padded"),
    ),
}  # fmt: skip
_PAIRS = {op: renumbering(*move) for op, move in MOVES.items()}
VIEWS: Sequence[object] = (
    aten.view, aten._unsafe_view, aten.reshape, aten._reshape_copy, aten._reshape_alias,
    aten.flatten, aten.unflatten, prims.reshape, prims.collapse_view, prims.split_dim,
    prims.collapse, aten.view_copy,
)  # fmt: skip


RULES: dict[object, Rule] = {
    **dict.fromkeys(VIEWS, view),
    **{op: rule for op, (rule, _) in _PAIRS.items()},
    **dict.fromkeys((aten.repeat, aten.tile), repeated),
    aten.repeat_interleave: repeat_interleaved,
    aten.as_strided: as_strided,
    **dict.fromkeys((aten.flip, prims.rev), flipped),
}  # fmt: skip
# Copies in place of views.
RULES |= {
    getattr(aten, f"{name}_copy"): RULES[getattr(aten, name)]
    for name in (
        "as_strided", "diagonal", "expand", "permute", "select", "squeeze", "t", "transpose",
        "unbind", "unfold", "unsqueeze",
    )
}  # fmt: skip
# Padding, windows and reversals change values by position, so digits do not follow them.
DIGITS: dict[object, Callable] = {
    **dict.fromkeys(VIEWS, view_digit),
    **{
        op: digits
        for op, (_, digits) in _PAIRS.items()
        if MOVES[op][0] not in (padded, last_dims_padded, selected)
    },
    aten.select: _PAIRS[aten.select][1],
}
