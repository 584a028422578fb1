"""Triton's compiler without a device."""

from __future__ import annotations

from lorafx.torch_internals.entries import Required, private_names

ENTRY = Required(
    use="kernels are compiled ahead of time",
    ended_by="a public name for triton.compiler",
    refused="lorafx.kernels.tools.aot, tune",
)

with private_names():
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.runtime.errors import OutOfResources
