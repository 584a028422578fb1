"""A pointwise region in front of a product, as text that a generated kernel computes.

    h[m, k] = f(g_0, g_1, …)        g_i = leaf[row, start + step · k]

A leaf is a tensor with a row for each row m, or a table whose row is chosen by ids[m] (biases of
experts). Steps of two are interleaved halves. Values are float32; where the graph itself casts to a
narrower type, so does the text. lorafx.graph.pointwise_region makes them from a graph.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Leaf:
    """A tensor that the region reads, (M, W), or (E, W) where its rows are `gathered` by ids."""

    dtype: torch.dtype
    gathered: bool = False

    @property
    def inputs(self) -> int:
        """How many tensors the op takes for it."""
        return 1 + self.gathered


@dataclass(frozen=True)
class Load:
    """g_i: columns start, start + step, … of a leaf, one for each k."""

    leaf: int
    start: int
    step: int


@dataclass(frozen=True)
class Activation:
    """f.

    Attributes:
        leaves: in the order in which the op takes them, each followed by its ids if gathered.
        loads: what the names g0, g1, … of the lines stand for.
        lines: Triton statements, each giving a name to a float32 expression of earlier names.
        result: the name of h.
    """

    leaves: tuple[Leaf, ...]
    loads: tuple[Load, ...]
    lines: tuple[str, ...]
    result: str

    @property
    def inputs(self) -> int:
        """How many tensors the leaves are."""
        return sum(leaf.inputs for leaf in self.leaves)
