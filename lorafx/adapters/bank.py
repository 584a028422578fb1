"""The bank: the low-rank factors of all slots of one group, at fixed addresses.

    delta_i(x) = scales[s, i] · (x A[s, i·R : i·R + r]ᵀ) B[s, :r, offset_i : offset_i + N_i]

with s the row's slot and r = ranks[s, i]. Rows with slot -1 are base rows. Factors beyond a
slot's own rank are never read, so traffic grows with what is active, not with what is reserved.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Bank:
    """Factors of S slots for a group of G siblings at rank at most R.

    Attributes:
        A: linear (S, G·R, K); embedding (S, V, R), so that a token's row is contiguous.
        B: (S, R, ΣN), N_i columns a sibling.
        ranks: (S, G) int32; 0 where the slot's adapter does not touch the sibling.
        scales: (S, G) float32, α/r or α/√r.
    """

    A: Tensor
    B: Tensor
    ranks: Tensor
    scales: Tensor

    @classmethod
    def allocate(
        cls,
        *,
        kind: str,
        slots: int,
        rank: int,
        in_features: int,
        out_features: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device,
    ) -> Bank:
        """A bank of zeros for siblings with these output sizes."""
        siblings = len(out_features)
        a_shape = (
            (slots, in_features, rank) if kind == "embedding" else (slots, siblings * rank, in_features)
        )
        return cls(
            A=torch.zeros(a_shape, dtype=dtype, device=device),
            B=torch.zeros((slots, rank, sum(out_features)), dtype=dtype, device=device),
            ranks=torch.zeros((slots, siblings), dtype=torch.int32, device=device),
            scales=torch.zeros((slots, siblings), dtype=torch.float32, device=device),
        )
