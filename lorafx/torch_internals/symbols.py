"""Symbolic sizes."""

from __future__ import annotations

from lorafx.torch_internals.entries import Required, private_names

ENTRY = Required(
    use="batch and length are symbols of a graph, and rows are followed through expressions "
    "over them",
    ended_by="torch.fx.experimental.symbolic_shapes without 'experimental'",
)

with private_names():
    from torch.fx.experimental.symbolic_shapes import (
        ShapeEnv,
        guard_or_false,
        guard_or_true,
        statically_known_true,
    )
    from torch.utils._sympy.functions import (
        CeilToInt,
        FloorDiv,
        FloorToInt,
        IntTrueDiv,
        Max,
        Min,
        Mod,
        PythonMod,
        TruncToInt,
    )
