"""Tensors that are made of others, and who holds a storage."""

from __future__ import annotations

from lorafx.torch_internals.entries import Required, private_names

ENTRY = Required(
    use="weights of tensor subclasses (quantised, distributed) are taken as the wholes that "
    "they are; weights that nothing else holds are packed",
    ended_by="a public is_traceable_wrapper_subclass; a public count of a storage's holders",
)

with private_names():
    from torch._C import _storage_Use_Count
    from torch.utils._python_dispatch import is_traceable_wrapper_subclass
