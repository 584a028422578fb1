"""A pointwise region in front of a product, as text that a generated kernel computes.

    h[m, k] = f(g_0, g_1, …)        g_i = leaf[row, start + step · k] (+ v[m] B[s], see below)

A leaf is a tensor with a row for each row m, or a table whose row is chosen by ids[m] (biases of
experts). Steps of two are interleaved halves. Values are float32; where the graph itself casts to a
narrower type, so does the text. lorafx.graph.pointwise_region makes them from a graph.

A leaf may be the base product of another LoRA node, whose delta nobody has added yet. The kernel
then adds it to what it reads: v is that node's shrink, B its bank, s the slot of row m.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lorafx.kernels.ops.delta_spec import DeltaSpec

#: Factors of a leaf's delta that a kernel holds in registers at once.
MOST_FACTORS = 64


@dataclass(frozen=True)
class Leaf:
    """A tensor that the region reads, (M, W), or (E, W) where its rows are `gathered` by ids.

    Attributes:
        delta: of the node whose base product it is, where its delta is still to be added; the op
            then takes that node's v, B and ranks behind the leaf.
        planes: of v.
    """

    dtype: torch.dtype
    gathered: bool = False
    delta: DeltaSpec | None = None
    planes: int = 1

    @property
    def inputs(self) -> int:
        """How many tensors the op takes for it."""
        return 1 + self.gathered + (0 if self.delta is None else 3)


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


@dataclass(frozen=True)
class DeltaPlace:
    """Where the delta of a load stands: the sibling, its range's number among those of v, and the
    column of B that the load's first column gets."""

    sibling: int
    number: int
    column: int


def delta_place(delta: DeltaSpec, load: Load, width: int) -> DeltaPlace | None:
    """The place of a load of `width` columns; None where they are not all of one sibling."""
    last, start = load.start + load.step * (width - 1), 0
    ranges = zip(delta.siblings, delta.offsets, delta.sizes, strict=True)
    for number, (sibling, offset, size) in enumerate(ranges):
        if start <= load.start and last < start + size:
            return DeltaPlace(sibling, number, offset + load.start - start)
        start += size
    return None
