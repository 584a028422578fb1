"""Rules for operators that take positions from index tensors, for masks and permutations of rows,
and for collectives over ranks.

x owned at d, indexed there by t whose values are the digit v(i) = (p[i] // k) mod m, is owned
through the composition: row i belongs to (v(i) // rows) mod B = (p[i] // (k·rows)) mod B, when m is
a whole number of periods. Writing runs the same map backwards.

Mixture-of-experts layers sort the (token, choice) pairs of all requests by expert: the indices p of
that vector sort are a permutation, p // k the tokens it visits, and its inverse is the second
argsort, or an iota written (index_put, scatter) at p. `Flow.inverses` records such pairs.

    x.masked_scatter(mask, source)      x[mask] = source

The k-th position takes the k-th element. If the requests of x and source are in turn, a request
gets its own elements if it has as many positions as elements. The rule assumes this and adds the
node to `Flow.fits`; `lorafx::own_mask` checks it at run time.

    all_reduce, wait    out[i] = Σ_rank a_rank[i]
    all_gather          out = [a_0; a_1; ...] along the first dimension, for the same requests

One file: reading and writing by an index, and its inverse, are one map read both ways (`Digit`).
"""

from __future__ import annotations

import operator
from typing import Any

import sympy
import torch
import torch.distributed as dist
from torch import fx

from lorafx.op_arguments import bound, index_of, operand
from lorafx.ownership.flow import Flow, Rule, wrap
from lorafx.ownership.labels import Digit, Label, Mixed, Own, Single
from lorafx.ownership.symbolic import ONE, divide, equal, is_multiple, product
from lorafx.torch_internals.graph_parts import OpOverload, c10d

aten, prims = torch.ops.aten, torch.ops.prims


def iota(node: fx.Node, flow: Flow) -> Digit | None:
    """arange(n) and prims.iota(n): 0, 1, ..., n - 1."""
    args = bound(node)
    start, step = flow.size(args.get("start", 0)), flow.size(args.get("step", 1))
    value = node.meta["val"]
    if start != 0 or step != ONE or value.dtype not in (torch.int32, torch.int64):
        return None
    return Digit(0, ONE, flow.shape(node)[0])


def vector_order(node: fx.Node, flow: Flow) -> Digit | None:
    """The indices of a vector sort: a permutation, and the inverse of a sorted permutation."""
    sort = operand(node) if node.target is operator.getitem else node
    if not isinstance(sort, fx.Node) or not isinstance(sort.target, OpOverload):
        return None
    packet = sort.target.overloadpacket
    indices = packet == aten.sort and node is not sort and index_of(node) == 1
    if not (indices or (packet == aten.argsort and node is sort)):
        return None
    keys = operand(sort)
    shape = flow.shape(keys)
    if len(shape) != 1:
        return None
    digit = flow.digit(keys)
    if digit is not None and digit.perm is not None and not bound(sort).get("descending"):
        whole = digit.rows == ONE and equal(digit.modulus, shape[0])
        if whole and digit.perm not in flow.inverses:
            flow.inverses[digit.perm], flow.inverses[node] = node, digit.perm
    return Digit(0, ONE, shape[0], node)


def inverse_written(node: fx.Node, flow: Flow) -> Digit | None:
    """t with t[p] = iota, for a permutation p of all of t: the inverse of p."""
    args = bound(node)
    if node.target.overloadpacket in (aten.scatter, aten.index_copy):  # type: ignore[union-attr]
        index, source = args["index"], args.get("src", args.get("source"))
    else:
        indices = args["indices"]
        index, source = (indices[0] if len(indices) == 1 else None), args["values"]
        if args.get("accumulate"):
            return None
    shape, p, i = flow.shape(node), flow.digit(index), flow.digit(source)
    if p is None or i is None or p.perm is None or i.perm is not None or len(shape) != 1:
        return None
    n = shape[0]
    exact = p.rows == i.rows == ONE and equal(p.modulus, n) and equal(i.modulus, n)
    if not exact or not equal(flow.shape(index)[0], n) or p.perm in flow.inverses:
        return None
    flow.inverses[p.perm], flow.inverses[node] = node, p.perm
    return Digit(0, ONE, n, node)


def in_turn(flow: Flow, tensor: fx.Node, label: Own) -> bool:
    """Whether, in row-major order, each request's elements follow the previous request's."""
    upto = product(flow.shape(tensor)[: label.dim + 1])
    return label.perm is None and equal(upto, label.rows * flow.batch)


def filled(
    node: fx.Node, flow: Flow, x: fx.Node, mask: fx.Node, first: int, source: fx.Node
) -> Single:
    """x with the positions of a mask, from dimension `first`, set to or increased by the source."""
    of_mask = flow.label(mask)
    if isinstance(of_mask, Own):
        of_mask = of_mask.at(of_mask.dim + first)
    label = flow.agree(node, [flow.label(x), of_mask])
    values = flow.label(source)
    if isinstance(label, Mixed) or values is None:
        return label
    if isinstance(values, Mixed):
        return values
    if not flow.assume or not isinstance(label, Own) or not isinstance(values, Own):
        return flow.lost(node, "different values are written to the positions of a mask")
    dim, sizes = label.dim - first, flow.shape(mask)
    whole = 0 <= dim < len(sizes) and equal(sizes[dim], flow.shape(x)[label.dim])
    if whole and in_turn(flow, x, label) and in_turn(flow, source, values):
        flow.fits.append(node)
        return label
    return flow.lost(
        node, "the values written to a mask's positions are not in the order of the requests"
    )


def masked_scatter(node: fx.Node, flow: Flow) -> Label:
    """masked_scatter(self, mask, source): the mask is broadcast to self."""
    args = bound(node)
    x, mask = args["self"], args["mask"]
    if flow.shape(node) != flow.shape(x):
        return flow.lost(node, "it is broadcast to its mask")
    return filled(node, flow, x, mask, len(flow.shape(x)) - len(flow.shape(mask)), args["source"])


def masked_operands(node: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node]:
    """x, the mask and the source of a node in `Flow.fits`."""
    args = bound(node)
    if "mask" in args:
        return args["self"], args["mask"], args["source"]
    return args["self"], next(t for t in args["indices"] if t is not None), args["values"]


def fixed(node: fx.Node, flow: Flow) -> Label:
    """Every entry keeps its position."""
    return flow.label(operand(node))


def gathered(node: fx.Node, flow: Flow) -> Label:
    """The ranks' tensors joined along dimension 0. If that is the owner's, the graph has to lay the
    ranks' rows side by side, as DTensor does to gather another dimension."""
    label = flow.label(operand(node))
    if isinstance(label, Own) and label.dim == 0 and (label.perm or not _side_by_side(node, flow)):
        return flow.lost(node, "the ranks' requests are gathered along their own dimension")
    return label


def _side_by_side(gather: fx.Node, flow: Flow) -> bool:
    """Whether the ranks' rows are split apart and concatenated along another dimension."""
    rows = flow.shape(operand(gather))[0]
    splits = [split for wait in gather.users for split in wait.users]
    joins = [join for split in splits for piece in split.users for join in piece.users]
    return (
        bool(joins)
        and all(s.target is aten.split.Tensor for s in splits)
        and all((flow.size(bound(s)["split_size"]), bound(s)["dim"]) == (rows, 0) for s in splits)
        and all(join.target is aten.cat.default for join in joins)
        and all(wrap(bound(join)["dim"], len(flow.shape(join))) for join in joins)
    )


class IndexedDims:
    """The dimensions of x[indices]. `at` maps a dimension of x to its index. The `count` dimensions
    of the broadcast indices begin at dimension `first` of the result."""

    def __init__(self, flow: Flow, ndim: int, indices: list[Any]) -> None:
        self.at = {d: t for d, t in enumerate(indices) if t is not None}
        self.count = max((len(flow.shape(t)) for t in self.at.values()), default=0)
        dims = list(self.at)
        adjacent = dims == list(range(dims[0], dims[0] + len(dims))) if dims else True
        self.first = dims[0] if dims and adjacent else 0
        self.free = [d for d in range(ndim) if d not in self.at]
        self.result = [("x", d) for d in self.free if d < self.first and adjacent]
        self.result += [("i", j) for j in range(self.count)]
        self.result += [("x", d) for d in self.free if ("x", d) not in self.result]

    def of_x(self, dim: int) -> int:
        return self.result.index(("x", dim))

    def of_index(self, dim: int) -> int:
        return self.result.index(("i", dim))


def is_boolean(arg: fx.Node) -> bool:
    return arg.meta["val"].dtype in (torch.bool, torch.uint8)


def indexed_dims(flow: Flow, x: fx.Node, indices: list[Any]) -> IndexedDims | None:
    """The dimensions of x[indices]; None for boolean masks, whose result size depends on data."""
    if any(t is not None and is_boolean(t) for t in indices):
        return None
    return IndexedDims(flow, len(flow.shape(x)), indices)


def indexed(node: fx.Node, flow: Flow) -> Label:
    """x[indices]."""
    x = bound(node)["self"]
    owner, dims = flow.label(x), indexed_dims(flow, x, indices_of(node, flow))
    if dims is None:
        return flow.lost(node, "rows chosen by a mask")
    if isinstance(owner, Mixed):
        return owner
    labels: list[Single] = []
    through = dims.at.get(owner.dim) if isinstance(owner, Own) else None
    if isinstance(owner, Own) and through is None:
        labels.append(owner.at(dims.of_x(owner.dim)))
    elif isinstance(owner, Own):
        digit = flow.digit(through)
        composed = compose(flow, owner, digit, flow.batch) if digit is not None else None
        if digit is not None and composed is not None:
            j = digit.dim + dims.count - len(flow.shape(through))
            labels.append(Own(dims.of_index(j), *composed))
        elif is_shared_vector(through, flow) and owner.perm is None:
            # Row i is row t[i], whatever that is: -1 is the last, of request -1 mod B, too.
            labels.append(Own(dims.of_index(dims.count - 1), owner.rows, through))
        else:
            return flow.lost(node, f"{owner} is indexed by values that are not known")
    for t in dims.at.values():
        if t is through:
            continue
        label = flow.aligned(t, dims.count)
        labels.append(label.at(dims.of_index(label.dim)) if isinstance(label, Own) else label)
    return flow.agree(node, labels)


def is_shared_vector(t: fx.Node | None, flow: Flow) -> bool:
    """Whether t is a vector that depends on no request."""
    return len(flow.shape(t)) == 1 and flow.label(t) is None


def indices_of(node: fx.Node, flow: Flow) -> list[Any]:
    """The indices by dimension: of `index`, or `dim` and one index."""
    args = bound(node)
    if "indices" in args:
        return list(args["indices"])
    return [None] * wrap(args["dim"], len(flow.shape(args["self"]))) + [args["index"]]


def index_digit(node: fx.Node, flow: Flow) -> Digit | None:
    """t[p] of known values t at known positions p, both vectors."""
    args = bound(node)
    indices, table = indices_of(node, flow), flow.digit(args["self"])
    index = flow.digit(indices[0])
    if table is None or index is None or len(indices) != 1 or len(flow.shape(args["self"])) != 1:
        return None
    composed = compose(flow, table, index, table.modulus)
    return Digit(index.dim, composed[0], table.modulus, composed[1]) if composed else None


def embedded(node: fx.Node, flow: Flow) -> Label:
    """embedding(weight, indices): a shared table, a row for each index."""
    args = bound(node)
    if flow.label(args["weight"]) is not None:
        return flow.lost(node, "the table depends on requests")
    return flow.label(args["indices"])


def written(node: fx.Node, flow: Flow, x: fx.Node, indices: list[Any], values: object) -> Single:
    """x with x[indices] replaced by (or increased by) values."""
    owner, dims = flow.label(x), indexed_dims(flow, x, indices)
    if dims is None:
        return masked_write(node, flow, x, indices, values)
    labels: list[Single] = [owner]
    of_values = flow.aligned(values, len(dims.result))
    if isinstance(of_values, Own):
        of_values = in_dims_of_x(node, flow, x, dims, of_values, "values")
    labels.append(of_values)
    for t in dims.at.values():
        label, digit = flow.aligned(t, dims.count), flow.digit(t)
        if isinstance(label, Mixed) and isinstance(of_values, Own) and digit is not None:
            continue  # the permutation that `in_dims_of_x` followed
        if isinstance(label, Own):
            label = in_dims_of_x(node, flow, x, dims, label, "index")
        labels.append(label)
    return flow.agree(node, labels)


def in_dims_of_x(
    node: fx.Node, flow: Flow, x: fx.Node, dims: IndexedDims, label: Own, role: str
) -> Single:
    """A label of the result of x[indices], or of the indices (`role`), in x's dimensions.

    Row i, of owner (p[i] // rows) mod B, is written to v(i) = (p[i] // k) mod m of dimension d:
    index v belongs to (v // (rows / k)) mod B.
    """
    kind, dim = dims.result[label.dim] if role == "values" else ("i", label.dim)
    if kind == "x":
        return label.at(dim)
    for d, t in dims.at.items():
        digit = flow.digit(t)
        if label.perm is t and flow.whole(flow.shape(x)[d], Own(d, label.rows)):
            return Own(d, label.rows)
        if digit is None or digit.dim + dims.count - len(flow.shape(t)) != dim:
            continue
        rows = divide(label.rows, digit.rows)
        invertible = (
            digit.perm is not None
            and label.perm is None
            and digit.rows == ONE
            and flow.inverses.get(digit.perm) is not None
        )
        if rows is not None and digit.perm is label.perm:
            owner = Own(d, rows)
            if equal(digit.modulus, flow.shape(x)[d]) and flow.whole(digit.modulus, owner):
                return owner
        elif invertible and equal(digit.modulus, flow.shape(x)[d]):
            # x[p] = y puts row i at p[i]: row j of x is y[inverse(p)[j]].
            return Own(d, label.rows, flow.inverses[digit.perm])  # type: ignore[index]
    return flow.lost(node, f"{label} is written to positions that are not known")


def masked_write(
    node: fx.Node, flow: Flow, x: fx.Node, indices: list[Any], values: object
) -> Single:
    """x[mask] = one value for all positions of the mask, or one for each."""
    n = len(flow.shape(x))
    masks = [(d, t) for d, t in enumerate(indices) if t is not None]
    if len(masks) != 1:
        return flow.lost(node, "written through several masks")
    (d, mask), m = masks[0], len(flow.shape(masks[0][1]))
    source, tail = flow.shape(values), flow.shape(x)[m:]
    if d == 0 and len(source) == len(tail) + 1 and all(map(equal, source[1:], tail)):
        return filled(node, flow, x, mask, 0, values)  # type: ignore[arg-type]
    if len(flow.shape(values)) > n - d - m or flow.label(values) is not None:
        return flow.lost(node, "different values are written to the positions of a mask")
    label = flow.label(mask)
    if isinstance(label, Own):
        label = label.at(label.dim + d)
    return flow.agree(node, [flow.label(x), label])


def index_written(node: fx.Node, flow: Flow) -> Label:
    """index_put; index_add, index_copy and index_reduce have a source, index_fill a value."""
    args, indices = bound(node), indices_of(node, flow)
    if "indices" in args:
        return written(node, flow, args["self"], indices, args["values"])
    source = args.get("source", args.get("value"))
    if not flow.shape(source):
        label = written(node, flow, args["self"], indices, None)
        return flow.agree(node, [flow.label(source), label])
    return written(node, flow, args["self"], indices, source)


def elementwise_index(node: fx.Node, flow: Flow) -> Label:
    """gather and scatter: index, source and result meet dimension by dimension, except `dim`."""
    args = bound(node)
    x, index, src = args["self"], args["index"], args.get("src", args.get("value"))
    n = len(flow.shape(x))
    dim = wrap(args["dim"], n)
    labels = [flow.label(x), flow.label(index), flow.label(src)]
    reads = src is None
    if reads and labels[0] is None:
        return labels[1]
    label = flow.agree(node, labels)
    if isinstance(label, Own):
        if label.dim == dim:
            return flow.lost(node, f"picks among {label}")
        sizes = [flow.shape(t)[label.dim] for t in (x, index, src) if len(flow.shape(t)) == n]
        if not all(flow.whole(size, label) for size in sizes):
            return flow.lost(node, "picks a part of the owner dimension")
        if label.perm is not None and any(size != sizes[0] for size in sizes):
            return flow.lost(node, "picks a part of permuted rows")
    return label


RULES: dict[object, Rule] = {
    **dict.fromkeys((aten.index, aten._unsafe_index, aten.index_select), indexed),
    aten.embedding: embedded,
    **dict.fromkeys(
        (
            aten.index_put, aten._unsafe_index_put, aten.index_add, aten.index_copy,
            aten.index_reduce, aten.index_fill,
        ),
        index_written,
    ),
    **dict.fromkeys(
        (aten.gather, aten.scatter, aten.scatter_add, aten.scatter_reduce, aten.take_along_dim),
        elementwise_index,
    ),
    aten.masked_scatter: masked_scatter,
}  # fmt: skip
if dist.is_available():
    RULES.update(
        {c10d.all_reduce: fixed, c10d.wait_tensor: fixed, c10d.all_gather_into_tensor: gathered}
    )


def compose(
    flow: Flow, outer: Own | Digit, index: Digit, modulus: sympy.Expr
) -> tuple[sympy.Expr, fx.Node | None] | None:
    """(rows, perm) of outer∘index: the digit `outer` at the positions in `index`."""
    if outer.perm is not None:
        inverse = index.perm is not None and flow.inverses.get(index.perm) is outer.perm
        exact = index.rows == ONE and inverse and is_multiple(index.modulus, outer.rows * modulus)
        return (outer.rows, None) if exact else None
    if not is_multiple(index.modulus, outer.rows * modulus):
        return None
    return outer.rows * index.rows, index.perm


DIGITS = {
    **dict.fromkeys((aten.index, aten._unsafe_index, aten.index_select), index_digit),
    **dict.fromkeys((aten.arange, prims.iota), iota),
    **dict.fromkeys((aten.sort, aten.argsort), vector_order),
    **dict.fromkeys(
        (aten.index_put, aten._unsafe_index_put, aten.scatter, aten.index_copy), inverse_written
    ),
}
