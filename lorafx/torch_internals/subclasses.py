"""Tensors that are made of others, and who holds a storage."""

from __future__ import annotations

from lorafx.torch_internals.versions import private_names

with private_names():
    from torch._C import _storage_Use_Count
    from torch.utils._python_dispatch import is_traceable_wrapper_subclass
