"""Rules for a paged cache: the keys and values of all requests (`Pooled`).

    paged_cache(key, value, ...)         Pooled(), Pooled()
    views, copies, casts, scaling        Pooled() again
    query · keys, weights · values       the rows of the operand that is no pool
    paged_attention(query, ...)          the rows of the queries

All other operators on a pool are refused.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx

from lorafx.kernels.ops.paged_attention import PAGED_ATTENTION, PAGED_CACHE
from lorafx.op_arguments import bound
from lorafx.ownership import contractions, pointwise, views
from lorafx.ownership.flow import Flow, Rule, each_output
from lorafx.ownership.labels import Label, Mixed, Own, Pooled, Single


def cached(node: fx.Node, flow: Flow) -> Label:
    """paged_cache(key, value, ...): pools for the queries of all requests."""
    return each_output(node, Pooled())


def attended(node: fx.Node, flow: Flow) -> Label:
    """paged_attention(query, ...): each query (1, H, T, D) sees the keys of its request."""
    label = flow.label(bound(node)["query"])
    if isinstance(label, Mixed) or (isinstance(label, Own) and label.dim == 2):
        return label
    return flow.lost(node, f"its queries are of {label}, where each is of a token")


def read(node: fx.Node, flow: Flow, labels: Sequence[Single], rule: Rule | None) -> Label:
    """The label of an operator on a pool; `rule` is the operator's."""
    mixed = next((label for label in labels if isinstance(label, Mixed)), None)
    if mixed is not None:
        return each_output(node, mixed)
    others = [label for label in labels if label is not None and not isinstance(label, Pooled)]
    if not others and rule in _MOVING:
        return each_output(node, Pooled())
    if others and rule in _CONTRACTING:
        pools = [n for n in node.all_input_nodes if isinstance(flow.label(n), Pooled)]
        kept = {pool: flow.labels[pool] for pool in pools}
        flow.labels.update(dict.fromkeys(pools))
        try:
            label = rule(node, flow)
        finally:
            flow.labels.update(kept)
        first = label[0] if isinstance(label, tuple) else label
        if isinstance(first, (Own, Mixed)):
            return label
    return each_output(node, flow.lost(node, "it takes what a paged cache holds of all requests"))


_CONTRACTING = frozenset(contractions.RULES.values()) - {contractions.grouped}
_MOVING = frozenset({*views.RULES.values(), views.sliced, pointwise.pointwise})

RULES: dict[object, Rule] = {
    PAGED_CACHE.overloadpacket: cached,
    PAGED_ATTENTION.overloadpacket: attended,
}
