"""How far apart two tensors are, and how far they may be.

error = max |got − want| / max(1, max |want|)
"""

from __future__ import annotations

import torch
from torch import Tensor

#: Tolerances of the error by dtype: the order of accumulation differs between stages, and errors
#: grow over layers.
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 6e-2}


def tolerance(dtype: torch.dtype) -> float:
    """The largest error that counts as none."""
    return _TOLERANCE.get(dtype, 1e-4)


def difference(got: Tensor, want: Tensor) -> float:
    """The error of a tensor; infinite where shapes differ or something is no number."""
    if got.shape != want.shape:
        return float("inf")
    if not want.numel():
        return 0.0
    scale = max(1.0, float(want.double().abs().max()))
    error = float((got.double() - want.double()).abs().max()) / scale
    return error if error == error else float("inf")
