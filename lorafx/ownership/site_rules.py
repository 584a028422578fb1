"""Rules for lorafx's operators.

    site(x, y, ...), rows_of(x, y)       y's rows; x and y belong together
    paged_cache(key, value, ...)         Pooled(), Pooled(): keys and values of all requests
    paged_attention(query, ...)          the rows of the queries

On a pool:

    views, copies, casts, scaling        Pooled() again
    paged_cache, paged_attention         as above, where it is their cache
    query · keys, weights · values       the rows of the operand that is no pool

All other operators on a pool are refused.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx

import lorafx.kernels.ops.conv_ops
import lorafx.kernels.ops.grouped_ops
import lorafx.kernels.ops.linear_ops
import lorafx.kernels.ops.row_ops  # noqa: F401  (all define torch.ops.lorafx)
from lorafx.kernels.ops.paged_attention import PAGED_ATTENTION, PAGED_CACHE
from lorafx.op_arguments import bound
from lorafx.ownership import contractions, pieces, pointwise, views
from lorafx.ownership.flow import Flow, Rule, each_output
from lorafx.ownership.labels import Label, Mixed, Own, Pooled, Single
from lorafx.ownership.symbolic import Shape, divide
from lorafx.registry import Kind

#: In the `meta` of a site whose x holds a copy for each request: the dimension of the copies.
COPIES_DIM = "lorafx_copies_dim"
_KINDS: dict[object, Kind] = {
    torch.ops.lorafx.embedding_site.default: "embedding",
    torch.ops.lorafx.conv_site.default: "conv",
}


def input_name(node: fx.Node) -> str:
    """The op's name of the tensor that meets A: an embedding takes ids."""
    return "ids" if "ids" in bound(node) else "x"


def input_of(node: fx.Node) -> fx.Node:
    """x of a site, or ids."""
    x: fx.Node = bound(node)[input_name(node)]
    return x


def row_dims(node: fx.Node) -> int:
    """The number of leading dimensions of x that index rows."""
    return row_dims_of(_KINDS.get(node.target, "linear"), input_of(node).meta["val"].dim())


def row_dims_of(kind: Kind, dims: int) -> int:
    """As `row_dims`, of a site of this kind whose x has `dims` dimensions."""
    return {"embedding": dims, "conv": 1}.get(kind, dims - 1)


def site(node: fx.Node, flow: Flow) -> Label:
    """site(x, y, ...), grouped_site, embedding_site(ids, y, ...): y's rows, each plus its delta.

    x and y have the same row dimensions. Banks and slots are shared by construction.
    """
    x, y = input_of(node), bound(node)["y"]
    label = flow.label(x)
    if label is None:
        label = copied_per_request(node, flow, x, flow.shape(y)[:-1])
    if isinstance(label, Own) and label.dim >= len(flow.shape(y)) - 1:
        return flow.lost(node, f"the feature dimension is {label}")
    return flow.agree(node, [flow.label(y), label])


def expert_site(node: fx.Node, flow: Flow) -> Label:
    """expert_site(x, y, ..., experts): y's rows, each plus its delta; no row moves."""
    args = bound(node)
    labels = [flow.label(args["x"]), flow.label(args["y"])]
    mixed = next((label for label in labels if isinstance(label, Mixed)), None)
    if mixed is not None:
        return mixed
    if any(isinstance(item, Own) and item.dim >= len(flow.shape(args["x"])) - 1 for item in labels):
        return flow.lost(node, f"the feature dimension is {labels[0]}")
    return flow.agree(node, labels)


def conv_site(node: fx.Node, flow: Flow) -> Label:
    """conv_site(x, y, ...): y's rows, each plus its delta; rows lie along the first dimension."""
    x, y = bound(node)["x"], bound(node)["y"]
    label = flow.agree(node, [flow.label(y), flow.label(x)])
    if label is None:
        label = copied_per_request(node, flow, x, flow.shape(y)[:1])
    if isinstance(label, Own) and label.dim:
        return flow.lost(node, f"a convolution works over {label}")
    return label


def copied_per_request(node: fx.Node, flow: Flow, x: fx.Node, shape: Shape) -> Own | None:
    """The label of a site whose shared x holds a copy for each request: `give_out` made the copies,
    or exactly one row dimension of x has B entries. `shape` are the sizes of y's row dimensions.
    `flow_through` withdraws the label if later nodes disagree."""
    if not flow.copies or node in flow.withheld:
        return None
    if COPIES_DIM in node.meta:
        rows = divide(shape[node.meta[COPIES_DIM]], flow.batch)
        if rows is None:
            return None
        flow.copied_sites.append(node)
        return Own(node.meta[COPIES_DIM], rows)
    dims = [d for d, size in enumerate(shape) if size == flow.batch]
    if not flow.batch.is_Symbol or len(dims) != 1:
        return None
    if shape != flow.shape(x)[: len(shape)]:
        return None
    flow.copied_sites.append(node)
    return Own(dims[0])


def rows_of(node: fx.Node, flow: Flow) -> Label:
    """rows_of(x, y): the label of y or, if that is Mixed, of x: row m of y comes from x's."""
    args = bound(node)
    x, y = args["x"], args["y"]
    label, of_x = flow.label(y), flow.label(x)
    if not isinstance(label, Mixed) or of_x is None:
        return label
    if isinstance(of_x, Own) and of_x.dim >= len(flow.shape(y)) - 1:
        return label
    return of_x


def cached(node: fx.Node, flow: Flow) -> Label:
    """paged_cache(key, value, ...): pools for the queries of all requests."""
    return each_output(node, Pooled())


def attended(node: fx.Node, flow: Flow) -> Label:
    """paged_attention(query, ...): each query (1, H, T, D) sees the keys of its request."""
    label = flow.label(bound(node)["query"])
    if isinstance(label, Mixed) or (isinstance(label, Own) and label.dim == 2):
        return label
    return flow.lost(node, f"its queries are {label}, and each should belong to a token")


def read_of_pool(node: fx.Node, flow: Flow, labels: Sequence[Single], rule: Rule | None) -> Label:
    """The label of an operator on a pool; `rule` is the operator's."""
    mixed = next((label for label in labels if isinstance(label, Mixed)), None)
    if mixed is not None:
        return each_output(node, mixed)
    pools = [n for n in node.all_input_nodes if isinstance(flow.label(n), Pooled)]
    if rule in (cached, attended) and pools == [bound(node)["cache"]]:
        return rule(node, flow)
    owned = [label for label in labels if label is not None and not isinstance(label, Pooled)]
    if not owned and rule in _MOVING:
        return each_output(node, Pooled())
    if owned and rule in _CONTRACTING:
        pool_labels = {pool: flow.labels[pool] for pool in pools}
        flow.labels.update(dict.fromkeys(pools))
        try:
            label = rule(node, flow)
        finally:
            flow.labels.update(pool_labels)
        first = label[0] if isinstance(label, tuple) else label
        if isinstance(first, (Own, Mixed)):
            return label
    return each_output(node, flow.lost(node, "it reads a paged cache's entries of all requests"))


_CONTRACTING = frozenset(contractions.RULES.values()) - {contractions.grouped}
_MOVING = frozenset({*views.RULES.values(), *pieces.RULES.values(), pointwise.pointwise})

lora = torch.ops.lorafx
RULES: dict[object, Rule] = {
    **dict.fromkeys((lora.site, lora.embedding_site, lora.grouped_site), site),
    lora.expert_site: expert_site,
    lora.conv_site: conv_site,
    lora.rows_of: rows_of,
    PAGED_CACHE.overloadpacket: cached,
    PAGED_ATTENTION.overloadpacket: attended,
}
