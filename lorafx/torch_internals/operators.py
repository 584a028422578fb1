"""Kinds of operators, and operators without a public name."""

from __future__ import annotations

from lorafx.torch_internals.entries import Required, private_names

ENTRY = Required(
    use="tell operators of ATen, packets and higher-order operators apart; grouped products, "
    "collectives",
    ended_by="public names for the classes of torch.ops",
)

with private_names():
    from torch import _grouped_mm as grouped_mm
    from torch._C import DispatchKeySet, _dispatch_keys
    from torch._inductor import inductor_prims  # defines prims.fma
    from torch._ops import (
        HigherOrderOperator,
        OperatorBase,
        OpOverload,
        OpOverloadPacket,
        _OpNamespace,
    )
