"""Nested containers of tensors."""

from __future__ import annotations

from lorafx.torch_internals.entries import Required, private_names

ENTRY = Required(
    use="walk arguments and results as Dynamo does",
    ended_by="torch.utils.pytree with tree_map_only",
)

with private_names():
    from torch.utils._pytree import tree_leaves, tree_map, tree_map_only
