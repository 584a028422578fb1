"""Known index values at their sources: iotas, sorts, and inverses of permutations.

Mixture-of-experts layers sort the (token, choice) pairs of all requests by expert: the indices p
of that vector sort are a permutation, p // k the tokens it visits, and its inverse is the second
argsort, or an iota written (index_put, scatter) at p. `Flow.inverses` records such pairs.
"""

from __future__ import annotations

import operator

import torch
from torch import fx

from lorafx.op_arguments import bound, index_of, operand
from lorafx.ownership.flow import Flow
from lorafx.ownership.labels import Digit
from lorafx.ownership.symbolic import ONE, equal
from lorafx.torch_internals.operators import OpOverload

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
    """The indices of a vector sort: a permutation, and the inverse of the one it sorts."""
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
