"""Rules for the collectives of tensor parallelism: every rank has the same requests.

all_reduce, wait    out[i] = Σ_rank a_rank[i]
all_gather          out = [a_0; a_1; ...] along the first dimension
"""

from __future__ import annotations

import torch.distributed as dist
from torch import fx

from lorafx.op_arguments import operand
from lorafx.ownership.flow import Flow, Rule
from lorafx.ownership.labels import Label, Own
from lorafx.torch_internals.collectives import c10d


def kept(node: fx.Node, flow: Flow) -> Label:
    """Each entry where it was."""
    return flow.label(operand(node))


def gathered(node: fx.Node, flow: Flow) -> Label:
    """The ranks' tensors one after another: only what is owned along another dimension is kept."""
    label = flow.label(operand(node))
    if isinstance(label, Own) and label.dim == 0:
        return flow.lost(node, "the ranks' requests are gathered along their own dimension")
    return label


RULES: dict[object, Rule] = {}
if dist.is_available():
    ops = c10d
    RULES = {ops.all_reduce: kept, ops.wait_tensor: kept, ops.all_gather_into_tensor: gathered}
