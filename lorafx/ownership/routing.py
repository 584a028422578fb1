"""Rules for routing: permutations, masks, and collectives over ranks.

Mixture-of-experts layers sort the (token, choice) pairs of all requests by expert: the indices p of
that vector sort are a permutation, p // k the tokens it visits, and its inverse is the second
argsort, or an iota written (index_put, scatter) at p. `Flow.inverses` records such pairs.

    x.masked_scatter(mask, source)      x[mask] = source

The k-th position takes the k-th element. If requests are in turn in x and source, a request gets
exactly its elements if it has as many positions as elements. That is assumed here, noted in
`Flow.fits`, and checked at run time (`lorafx::own_mask`).

    all_reduce, wait    out[i] = Σ_rank a_rank[i]
    all_gather          out = [a_0; a_1; ...] along the first dimension
"""

from __future__ import annotations

import operator

import torch
import torch.distributed as dist
from torch import fx

from lorafx.op_arguments import bound, index_of, operand
from lorafx.ownership.flow import Flow, Rule
from lorafx.ownership.labels import Digit, Label, Mixed, Own, Single
from lorafx.ownership.symbolic import ONE, equal, product
from lorafx.torch_internals.operators import OpOverload, c10d

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
    """The indices of a vector sort: a permutation, maybe the inverse of the sorted one."""
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
    known = flow.digit(keys)
    if known is not None and known.perm is not None and not bound(sort).get("descending"):
        whole = known.rows == ONE and equal(known.modulus, shape[0])
        if whole and known.perm not in flow.inverses:
            flow.inverses[known.perm], flow.inverses[node] = node, known.perm
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


DIGITS = {
    **dict.fromkeys((aten.arange, prims.iota), iota),
    **dict.fromkeys((aten.sort, aten.argsort), vector_order),
    **dict.fromkeys(
        (aten.index_put, aten._unsafe_index_put, aten.scatter, aten.index_copy), inverse_written
    ),
}


def in_turn(flow: Flow, tensor: fx.Node, label: Own) -> bool:
    """Whether, in row-major order, each request's elements follow the previous request's."""
    upto = product(flow.shape(tensor)[: label.dim + 1])
    return label.perm is None and equal(upto, label.rows * flow.batch)


def chosen(
    node: fx.Node, flow: Flow, x: fx.Node, mask: fx.Node, first: int, source: fx.Node
) -> Single:
    """x with masked positions, from dimension `first`, set to or increased by the source."""
    at = flow.label(mask)
    label = flow.agree(node, [flow.label(x), at.at(at.dim + first) if isinstance(at, Own) else at])
    own = flow.label(source)
    if isinstance(label, Mixed) or own is None:
        return label
    if isinstance(own, Mixed):
        return own
    if not flow.assume or not isinstance(label, Own) or not isinstance(own, Own):
        return flow.lost(node, "different values are written to the positions of a mask")
    dim, sizes = label.dim - first, flow.shape(mask)
    whole = 0 <= dim < len(sizes) and equal(sizes[dim], flow.shape(x)[label.dim])
    if whole and in_turn(flow, x, label) and in_turn(flow, source, own):
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
    return chosen(node, flow, x, mask, len(flow.shape(x)) - len(flow.shape(mask)), args["source"])


RULES: dict[object, Rule] = {aten.masked_scatter: masked_scatter}


def parts(node: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node]:
    """x, the mask and the source of a node in `Flow.fits`."""
    args = bound(node)
    if "mask" in args:
        return args["self"], args["mask"], args["source"]
    return args["self"], next(t for t in args["indices"] if t is not None), args["values"]


def kept(node: fx.Node, flow: Flow) -> Label:
    """Each entry in place."""
    return flow.label(operand(node))


def gathered(node: fx.Node, flow: Flow) -> Label:
    """The ranks' tensors concatenated: only other owned dimensions are kept."""
    label = flow.label(operand(node))
    if isinstance(label, Own) and label.dim == 0:
        return flow.lost(node, "the ranks' requests are gathered along their own dimension")
    return label


if dist.is_available():
    RULES.update(
        {c10d.all_reduce: kept, c10d.wait_tensor: kept, c10d.all_gather_into_tensor: gathered}
    )
