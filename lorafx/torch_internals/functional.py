"""Graphs that write nothing, and kernels of Triton in them."""

from __future__ import annotations

from lorafx.torch_internals.entries import Required, private_names

ENTRY = Required(
    use="the bodies of Triton's operators are traced into a graph; a stamp overwrites an input "
    "of the graph",
    ended_by="a pass of torch's that takes the operators of torch.library.triton_op apart",
)

with private_names():
    from torch import (
        _from_functional_tensor,
        _functionalize_commit_update,
        _functionalize_replace,
        _functionalize_sync,
        _sync,
    )
    from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table
    from torch._subclasses.functional_tensor import FunctionalTensorMode, dispatch_functionalize
    from torch.fx.experimental.proxy_tensor import make_fx
