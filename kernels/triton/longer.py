"""How x and W are made longer so that one product holds the deltas: which columns are whose.

    x' = [ v of left siblings | x | v of right siblings ]      W' likewise with B

A sibling has `blocks` blocks of `width` columns, a block for each slot of the bank or for each
request. A row's v is in its own block, the rest of its columns are 0. One product takes all
columns, and W' is 0 in the columns of other siblings; or each sibling has a product of its own over
the columns up to its own, those with most rows of W next to x on either side.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lorafx.kernels.ops.delta_spec import DeltaSpec

#: Elements that columns come in: what a matrix instruction takes of K, and 32 bytes.
UNIT = 16


@dataclass(frozen=True)
class Longer:
    """A choice of columns.

    Attributes:
        apart: a product for each sibling, instead of one for all.
        requests: a block for each request of the batch, instead of each slot of the bank.
    """

    apart: bool = False
    requests: bool = False


@dataclass(frozen=True)
class ConcatLayout:
    """Where the columns lie.

    Attributes:
        width: columns of a block.
        left: siblings left of x.
        places: of each column range, which of the siblings' columns are its own, from the left.
    """

    in_features: int
    width: int
    left: int
    places: tuple[int, ...]
    apart: bool

    @classmethod
    def of(cls, delta: DeltaSpec, longer: Longer) -> ConcatLayout:
        """The layout of a node's columns."""
        count = len(delta.sizes)
        left = count // 2 if longer.apart else 0
        places = list(range(count))
        if longer.apart:  # by size, in turn right and left of x
            for turn, j in enumerate(sorted(places, key=lambda j: -delta.sizes[j])):
                places[j] = left - 1 - turn // 2 if turn % 2 else left + turn // 2
        width = width_of(delta.max_rank)
        return cls(delta.in_features, width, left, tuple(places), longer.apart)

    def columns(self, blocks: int) -> tuple[int, int]:
        """Columns left and right of x."""
        return self.left * blocks * self.width, (len(self.places) - self.left) * blocks * self.width

    def span(self, place: int, blocks: int) -> tuple[int, int]:
        """Where in x' the columns begin and end that the product of a sibling takes."""
        own, (left, right) = blocks * self.width, self.columns(blocks)
        if not self.apart:
            return 0, left + self.in_features + right
        if place < self.left:
            return place * own, left + self.in_features
        return left, left + self.in_features + (place - self.left + 1) * own


def width_of(rank: int) -> int:
    """Columns of a block for adapters of up to `rank`."""
    return -(-rank // UNIT) * UNIT


def room_for(siblings: int, rank: int, slots: int) -> tuple[int, int]:
    """Columns left and right of W that "concat_apart" needs for all slots of a bank."""
    own = slots * width_of(rank)
    return siblings // 2 * own, (siblings - siblings // 2) * own


def refusal(delta: DeltaSpec, weight_dtype: torch.dtype | None) -> str:
    """Why x and W cannot be made longer; "" where they can."""
    dtypes = {delta.x_dtype, delta.bank_dtype, delta.y_dtype, weight_dtype}
    if len(dtypes) != 1:
        return "x, W, the bank and y are not of one type"
    if delta.x_dtype == torch.float16:
        return "x A may overflow float16"
    if delta.in_features % UNIT:
        return f"K is {delta.in_features}, not a multiple of {UNIT}"
    return ""
