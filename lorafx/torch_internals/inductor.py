"""Inductor's steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from lorafx.torch_internals.versions import private_names

with private_names():
    from torch._inductor import inductor_prims  # defines prims.fma
    from torch._inductor import lowering as _lowering  # max_pool2d's decomposition reaches for it
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
    """Note the code that Inductor makes, or finds in its cache, under Dynamo's lock."""

    lowered: Any = GraphLowering
    before = lowered.save_output_code

    def keep(code: str) -> None:
        note(code)
        if before is not None:
            before(code)

    lowered.save_output_code = keep
    try:
        yield
    finally:
        lowered.save_output_code = before


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
