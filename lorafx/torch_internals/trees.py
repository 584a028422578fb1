"""Nested containers of tensors."""

from __future__ import annotations

from lorafx.torch_internals.versions import private_names

with private_names():
    from torch.utils._pytree import tree_leaves, tree_map, tree_map_only
