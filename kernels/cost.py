"""The cost model's floor: bytes that any LoRA step must move over those of the base alone.

    floor(D) = 1 + D · r · Σ_i (K_i + N_i) / Σ_i (K_i · N_i)

A decode step reads W once and the A and B of every distinct adapter in the batch once; siblings
that share x still have an A each.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import torch


class Sized(Protocol):
    @property
    def in_features(self) -> int: ...

    @property
    def out_features(self) -> int: ...


def byte_floor(sites: Iterable[Sized], rank: int, distinct: int) -> float:
    """Least traffic of these sites with `distinct` adapters of `rank`, over the base's alone.

    Elements are counted, so base and adapters are taken to have one dtype.
    """
    factors = weights = 0
    for site in sites:
        factors += site.in_features + site.out_features
        weights += site.in_features * site.out_features
    return 1 + distinct * rank * factors / weights if weights else 1.0


def split_is_faster(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether one GEMM a sibling beats one GEMM over the packed weight.

    Measured (Zen 4, 2 cores, MKL for float32, oneDNN for bfloat16, K 1024, q/k/v of 1024 and
    gate/up of 2816, weights out of cache), packed over split:

        M                 1     2     4     8     16    64    128   1024
        float32  q/k/v    1.00  1.19  1.15  1.15  1.06  1.03  1.00  1.05
        float32  gate/up  0.98  1.11  1.14  1.17  1.08  1.09  1.13  1.07
        bfloat16 q/k/v    0.86  0.86  0.84  0.86  0.91  0.95  0.97  1.00
        bfloat16 gate/up  0.96  0.95  0.96  0.97  0.96  0.97  0.99  1.00
    """
    return device.type == "cpu" and dtype in (torch.float32, torch.float64)
