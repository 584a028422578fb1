"""The cost model's floor: bytes that any LoRA step must move over those of the base alone.

    floor(D) = 1 + D · r · Σ_i (K_i + N_i) / Σ_i (K_i · N_i)

A decode step reads W once and the A and B of every distinct adapter in the batch once; siblings
that share x still have an A each.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol


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
