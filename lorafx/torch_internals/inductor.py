"""The steps of Inductor, and changes to the code that it generates."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from lorafx.torch_internals.versions import private_names

with private_names():
    from torch._inductor import inductor_prims  # defines prims.fma
    from torch._inductor import lowering as _lowering  # max_pool2d's decomposition uses it
    from torch._inductor.codegen.wrapper import PythonWrapperCodegen
    from torch._inductor.compile_fx import (
        _recursive_joint_graph_passes,
        compile_fx,
        compile_fx_inner,
        get_static_input_idxs,
    )
    from torch._inductor.decomposition import select_decomp_table
    from torch._inductor.graph import GraphLowering


@contextmanager
def code_noted(note: Callable[[str], None]) -> Iterator[None]:
    """Calls `note` with the code that Inductor generates or finds in its cache in the block."""

    lowering: Any = GraphLowering
    original = lowering.save_output_code

    def keep(code: str) -> None:
        note(code)
        if original is not None:
            original(code)

    lowering.save_output_code = keep
    try:
        yield
    finally:
        lowering.save_output_code = original


def launch_dependents_early() -> None:
    """Make Inductor launch kernels that contain their own wait while the kernel before them runs.
    Inductor's option does so only for kernels that it writes; the others would start later."""
    original = PythonWrapperCodegen.define_kernel
    if getattr(original, "_lorafx", False):
        return

    def define_kernel(self: Any, name: str, body: str, *rest: Any, **kwargs: Any) -> Any:
        if "griddepcontrol.wait" in body:
            body = body.replace("triton_meta={", "triton_meta={'launch_pdl': True, ", 1)
        return original(self, name, body, *rest, **kwargs)

    define_kernel._lorafx = True  # type: ignore[attr-defined]
    setattr(PythonWrapperCodegen, "define_kernel", define_kernel)  # noqa: B010  a method for mypy
