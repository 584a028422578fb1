"""The factors of one part of a site, as they were saved."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class LoraWeights(NamedTuple):
    """One part's factors: A (r, K) and B (N, r) in the file's dtype, and s. DoRA's m (N,) is its
    `magnitude`. `bias` (N,) is that of lora_B, `own_bias` (N,) takes the place of the base's.

    Of routed experts A (E, r, K), B (E, N, r), and s and `ranks` (E,), an expert's rank being at
    most r and 0 where the adapter does not touch it.
    """

    A: Tensor
    B: Tensor
    scale: float | Tensor
    ranks: Tensor | None = None
    magnitude: Tensor | None = None
    bias: Tensor | None = None
    own_bias: Tensor | None = None

    @property
    def rank(self) -> int:
        return self.B.shape[-1]
