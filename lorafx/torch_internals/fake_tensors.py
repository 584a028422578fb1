"""Tensors without numbers, which graphs are traced with."""

from __future__ import annotations

from lorafx.torch_internals.entries import Required, private_names

ENTRY = Required(
    use="sizes, strides and dtypes of what is computed in a graph, and of new nodes",
    ended_by="a public name for torch._subclasses.fake_tensor",
)

with private_names():
    from torch._dispatch.python import enable_python_dispatcher
    from torch._guards import detect_fake_mode
    from torch._subclasses.fake_tensor import (
        FakeTensor,
        FakeTensorMode,
        in_kernel_invocation_manager,
        unset_fake_temporarily,
    )
