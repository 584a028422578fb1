"""Rules for lorafx's own operators: y plus a delta of x's rows; x and y belong together."""

from __future__ import annotations

import torch
from torch import fx

import lorafx.kernels.ops  # noqa: F401  (defines torch.ops.lorafx)
from lorafx.ownership.flow import Flow, Rule, bound
from lorafx.ownership.labels import Label, Own


def site(node: fx.Node, flow: Flow) -> Label:
    """site(x, y, ...) and embedding_site(ids, y, ...): y's rows, each plus its own delta.

    The row dimensions of x and y are the same (all but the last; for ids all), so an owner that
    is one of them keeps its number. Banks and slots are shared by construction.
    """
    args = bound(node)
    x, y = args.get("x", args.get("ids")), args["y"]
    label = flow.label(x)
    if isinstance(label, Own) and label.dim >= len(flow.shape(y)) - 1:
        return flow.lost(node, f"the feature dimension is the owner dimension of {label}")
    return flow.agree(node, [flow.label(y), label])


RULES: dict[object, Rule] = dict.fromkeys(
    (torch.ops.lorafx.site, torch.ops.lorafx.embedding_site), site
)
