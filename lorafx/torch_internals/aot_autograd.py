"""The functional graph, and what its inputs and results are."""

from __future__ import annotations

from lorafx.torch_internals.entries import Required, private_names

ENTRY = Required(
    use="Dynamo's graph becomes one of ATen's operators that writes nothing",
    ended_by="a public aot_autograd backend whose graph says what each input and result is",
)

with private_names():
    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch._aot_autograd.descriptors import (
        InputMutationAOTOutput,
        PlainAOTInput,
        PlainAOTOutput,
    )
