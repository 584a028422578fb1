"""Code that Inductor writes around the kernels that it is given."""

from __future__ import annotations

from typing import Any

from lorafx.torch_internals.entries import Required, private_names

ENTRY = Required(
    use="memory for the descriptors of kernels in ahead-of-time packages; kernels launch early",
    ended_by="torch 2.13 for the memory; an option of Inductor's for kernels that it is given",
    refused='lowering="triton"',
)

with private_names():
    from torch._inductor.codegen.cuda.device_op_overrides import CUDADeviceOpOverrides
    from torch._inductor.codegen.wrapper import PythonWrapperCodegen


def launch_dependents_early() -> None:
    """Have Inductor launch kernels that wait for the one before them while that one still runs.

    Inductor has an option of its own for this, but for the kernels that it writes, not for those
    that it is given. Without the attribute such kernels are right, and start later.
    """
    original = PythonWrapperCodegen.define_kernel
    if getattr(original, "_lorafx", False):
        return

    def define_kernel(self: Any, name: str, body: str, *rest: Any, **named: Any) -> Any:
        if "griddepcontrol.wait" in body:
            body = body.replace("triton_meta={", "triton_meta={'launch_pdl': True, ", 1)
        return original(self, name, body, *rest, **named)

    define_kernel._lorafx = True  # type: ignore[attr-defined]
    setattr(PythonWrapperCodegen, "define_kernel", define_kernel)  # noqa: B010  a method for mypy


def scratch_for_each_program() -> None:
    """Have Inductor's C++ code give each program of a kernel the memory for its descriptors.

    torch 2.13 does. Before, ahead-of-time packages gave that of one program to all of a grid, which
    then wrote behind it.
    """
    original = CUDADeviceOpOverrides.cpp_scratch

    def cpp_scratch(self: Any, idx: int, workspace: Any, prefix: str | None = None) -> Any:
        found = original(self, idx, workspace, prefix)
        if found is None or not workspace.size or "grid_0" in found[0][0]:
            return found
        first = f"{{static_cast<int64_t>({workspace.size}) * grid_0 * grid_1 * grid_2}}"
        lines = [found[0][0].replace(f"{{{workspace.size}}}", first), *found[0][1:]]
        assert lines[0] != found[0][0], "Inductor's scratch memory is written in another way"
        return lines, found[1]

    if not getattr(original, "_lorafx", False):
        cpp_scratch._lorafx = True  # type: ignore[attr-defined]
        setattr(CUDADeviceOpOverrides, "cpp_scratch", cpp_scratch)  # noqa: B010  for mypy
