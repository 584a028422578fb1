"""Which module classes may carry LoRA, looked up along the class hierarchy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import nn

Kind = Literal["linear", "embedding"]


@dataclass(frozen=True)
class Eligible:
    """One registered class: how to read the sizes and the weight of its instances.

    Attributes:
        cls: the class; its subclasses are eligible too, the nearest entry along the MRO wins.
        kind: "linear" (y = x Wᵀ) or "embedding" (y = W[ids]).
        sizes: instance -> (in_features, out_features).
        weight: attribute that holds the base weight.
        transposed: True where the weight is stored (in, out), as in transformers' Conv1D.
    """

    cls: type[nn.Module]
    kind: Kind
    sizes: Callable[[nn.Module], tuple[int, int]]
    weight: str = "weight"
    transposed: bool = False
