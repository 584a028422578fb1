"""What an adapter means on the sites of a model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Size, Tensor

from lorafx.model.bank import OwnWeight
from lorafx.model.extras import When


class LoraWeights(NamedTuple):
    """A part's A (r, K), B (N, r) and s; DoRA's `magnitude`, lora_B's `bias` and a replacing
    `own_bias` (N,).

    Routed experts: A (E, r, K), B (E, N, r), s and `ranks` (E,), 0 for untouched experts.
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
        weights: `Site.part_path` -> factors; untouched parts are absent.
        spans: packed module's name -> slices that its rows cover, where not declared.
        own: site path -> rows of its weight that the adapter replaces.
        replaces_biases: the adapter was trained with biases that replace the base's.
        compared: the file's copies of base weights were compared with the model's.
        invocation: the tokens from which on it is active (aLoRA); empty if always.
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
    def extras(self) -> dict[When, tuple[str, ...]]:
        """The parts and sites with `EXTRAS`, by their names."""
        parts = self.weights.items()
        return {
            "dora": tuple(path for path, w in parts if w.magnitude is not None),
            "own": tuple(self.own),
            "bias": tuple(p for p, w in parts if w.bias is not None or w.own_bias is not None),
        }
