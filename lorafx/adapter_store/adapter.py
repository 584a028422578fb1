"""What an adapter means on the sites of a model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Size, Tensor

from lorafx.model.bank import OwnWeight


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


@dataclass(frozen=True)
class Adapter:
    """A decoded adapter.

    Attributes:
        name: what requests call it.
        weights: `Site.part_path` -> factors; what the adapter does not touch is absent.
        rank: the largest rank that it was trained with anywhere.
        source: where it was read from, for messages.
        spans: path of a name of a packed module -> the slices that its rows say it covers, where
            that is not declared.
        own: path of a site -> the rows of its weight that the adapter has of its own.
        notes: what was decided while it was read, a line each.
        replaces_biases: it was trained with biases in the place of the base's, of which those are
            kept that differ from the model's.
        compared: its file holds copies of base weights, which were compared with the model's.
        invocation: the tokens from which on it is active (aLoRA); empty where it always is.
        keys: its keys, in PEFT's names, with the shapes of their tensors.
    """

    name: str
    weights: dict[str, LoraWeights]
    rank: int
    source: str
    spans: Mapping[str, range] = field(default_factory=dict)
    own: Mapping[str, OwnWeight] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    replaces_biases: bool = False
    compared: bool = False
    invocation: tuple[int, ...] = ()
    keys: Mapping[str, Size] = field(default_factory=dict)

    @property
    def magnitudes(self) -> tuple[str, ...]:
        """The parts whose outputs it rescales (DoRA)."""
        return tuple(p for p, weights in self.weights.items() if weights.magnitude is not None)

    @property
    def biased(self) -> tuple[str, ...]:
        """The parts to whose outputs it adds a bias."""
        return tuple(
            p for p, w in self.weights.items() if w.bias is not None or w.own_bias is not None
        )
