"""Code that Inductor writes around the kernels that it is given."""

from __future__ import annotations

from typing import Any

from lorafx.torch_internals.entries import Required, private_names

ENTRY = Required(
    use="kernels launch early",
    ended_by="an option of Inductor's for kernels that it is given",
    refused='lowering="triton"',
)

with private_names():
    from torch._inductor.codegen.wrapper import PythonWrapperCodegen


def launch_dependents_early() -> None:
    """Let Inductor launch kernels that wait by themselves while the kernel before them runs; its
    own option does so only for kernels that it writes. Without it they start later."""
    original = PythonWrapperCodegen.define_kernel
    if getattr(original, "_lorafx", False):
        return

    def define_kernel(self: Any, name: str, body: str, *rest: Any, **named: Any) -> Any:
        if "griddepcontrol.wait" in body:
            body = body.replace("triton_meta={", "triton_meta={'launch_pdl': True, ", 1)
        return original(self, name, body, *rest, **named)

    define_kernel._lorafx = True  # type: ignore[attr-defined]
    setattr(PythonWrapperCodegen, "define_kernel", define_kernel)  # noqa: B010  a method for mypy
