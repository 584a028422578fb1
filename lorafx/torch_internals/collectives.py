"""Operators that the ranks of a group run together, in graphs."""

from __future__ import annotations

import torch
from torch import distributed as dist

from lorafx.torch_internals.entries import Required, private_names

ENTRY = Required(
    use="tensor-parallel layers sum and gather in graphs, and rows are followed through it",
    ended_by="public functional collectives",
    refused="tensor-parallel layers",
)

with private_names():
    if dist.is_available():
        # Gives the functional collectives their fake implementations.
        import torch.distributed._functional_collectives

    c10d = torch.ops._c10d_functional
