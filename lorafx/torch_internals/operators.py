"""Kinds of operators, and operators without a public name."""

from __future__ import annotations

import torch
from torch import distributed as dist

from lorafx.torch_internals.versions import private_names

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

    if dist.is_available():
        # Gives the functional collectives their fake implementations.
        import torch.distributed._functional_collectives

    c10d = torch.ops._c10d_functional
