"""Inductor's steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from lorafx.torch_internals.entries import Required, private_names

ENTRY = Required(
    use="the rewritten graph is lowered by Inductor's passes and its inner compile",
    ended_by="torch.compiler with an entry for functional graphs of ATen",
    refused='lowering="inductor" and "triton"',
)

with private_names():
    from torch._inductor.compile_fx import (
        _recursive_joint_graph_passes,
        compile_fx,
        compile_fx_inner,
        get_static_input_idxs,
    )
    from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
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
