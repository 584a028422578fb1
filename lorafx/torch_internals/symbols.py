"""Symbolic sizes."""

from __future__ import annotations

from lorafx.torch_internals.versions import private_names

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
