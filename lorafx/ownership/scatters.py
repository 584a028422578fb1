"""Rules for writing the elements of a source, in order, to the positions that a mask chooses.

    x.masked_scatter(mask, source)      x[mask] = source

The k-th position takes the k-th element. Where the requests' parts of x and of the source follow
one another, in order and whole, the k-th element is the request's own exactly if each request has
as many positions as elements. That depends on the values of the mask: it is assumed here, noted in
`Flow.fits`, and asked when the graph runs (`lorafx::own_mask`). A source that depends on no request
may go anywhere.
"""

from __future__ import annotations

import torch
from torch import fx

from lorafx.op_arguments import bound
from lorafx.ownership.flow import Flow, Rule
from lorafx.ownership.labels import Label, Mixed, Own, Single
from lorafx.ownership.symbolic import equal, product

aten = torch.ops.aten


def in_turn(flow: Flow, tensor: fx.Node, label: Own) -> bool:
    """In row-major order all elements of the first request come first, then all of the second."""
    upto = product(flow.shape(tensor)[: label.dim + 1])
    return label.perm is None and equal(upto, label.rows * flow.batch)


def chosen(
    node: fx.Node, flow: Flow, x: fx.Node, mask: fx.Node, first: int, source: fx.Node
) -> Single:
    """x with the positions of the mask, which begins at dimension `first` of x, replaced by the
    source's elements, or increased by them."""
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
    """x, the mask and the source of a node that is in `Flow.fits`."""
    args = bound(node)
    if "mask" in args:
        return args["self"], args["mask"], args["source"]
    return args["self"], next(t for t in args["indices"] if t is not None), args["values"]
