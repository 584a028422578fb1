"""What generated kernels for attention over a paged cache take for granted, and their tiles.

    tile = BLOCK_M rows of queries (tokens of one request times the heads of a group)
           × BLOCK_N keys of one head

A decode step has a tile with the heads of one group and little else in it, reads keys once, and
wants many programs; a chunk of a prompt reads the same keys for many tokens. How many tokens a step
has is known on the host, whose they are is not. So tiles are chosen by the number of tokens, and
keys are cut into parts where that makes fewer programs than processors. None of the figures here
was measured on a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from lorafx.kernels.ops.delta_spec import FLOATS
from lorafx.kernels.ops.paged_attention import AttentionSpec, PagedStep
from lorafx.kernels.triton.triton_tiles import Architecture, Tiles, power_of_two

#: Numbers a head at most: of more, a tile's sums do not fit into registers.
MOST_SIZE = 256
#: Heads of a group at most, for the same reason.
MOST_GROUP = 64
#: Tokens of a step up to which tiles are those of decode.
FEW = 128
#: Programs for each processor that keys are cut up for.
WAVES = 2
#: Parts of the keys at most, and keys of a part at least.
MOST_PARTS, LEAST_KEYS = 16, 256


def has_kernels(step: PagedStep) -> bool:
    """Whether kernels are generated for a step, whose tensors may be fake. Not for other types than
    16- and 32-bit floats, a mask of another type, heads of more than MOST_SIZE numbers, and groups
    of more than MOST_GROUP heads."""
    query, key = step.query, step.key
    heads, size = key.shape[1], key.shape[3]
    typed = query.dtype in FLOATS and query.dtype == key.dtype and query.dtype == step.mask.dtype
    sized = 0 < size <= MOST_SIZE and 0 < heads <= query.shape[1] <= MOST_GROUP * heads
    return typed and sized


@dataclass(frozen=True)
class PagedAttentionSpec(AttentionSpec):
    """What generated Triton kernels take for granted.

    Attributes:
        sinks: whether each head has a further score, whose value is 0.
        ring: whether new tokens are written after the old ones are read.
    """

    sinks: bool = False
    ring: bool = False

    @classmethod
    def of(cls, step: PagedStep) -> PagedAttentionSpec | None:
        """The spec of a step; None where `has_kernels` is not."""
        if not has_kernels(step):
            return None
        return cls.of_sizes(step, sinks=step.sinks is not None, ring=step.ring)

    def parameters(self) -> dict[str, Any]:
        """What the template is filled with, beside tiles and the name of the dtype."""
        return {
            "heads": self.heads,
            "group": self.group,
            "size": self.size,
            "block_d": power_of_two(self.size, 16, MOST_SIZE),
            "capped": self.capped,
            "sinks": self.sinks,
            "ring": self.ring,
            "hidden": repr(torch.finfo(self.dtype).min / 2),
        }


def attention_tiles(spec: PagedAttentionSpec, few: bool, arch: Architecture) -> Tiles:
    """Tiles of "attend" and "attend_split" for a step of `few` tokens, at most FEW, or of more.

    Products of float32 numbers are made without matrix instructions, and take registers for both
    operands: tiles are as small as can be.
    """
    wide = spec.size > 128
    least = power_of_two(spec.group, 16, MOST_GROUP)
    if arch.name == "interpreter":
        return Tiles(block_m=least, block_n=32)
    if spec.dtype == torch.float32:
        return Tiles(block_m=least, block_n=16 if wide else 32, num_stages=2)
    stages = 2 if wide or arch.warp == 64 else 3
    tiles = Tiles(block_m=least, block_n=32 if wide else 64, num_stages=stages)
    return (
        tiles
        if few
        else replace(tiles, block_m=64, block_n=32, num_warps=8 if wide and arch.warp == 32 else 4)
    )


def parts_for(programs: int, keys: int, arch: Architecture) -> int:
    """Into how many parts the keys of a token are cut.

    Args:
        programs: that there are with one part.
        keys: of all requests; none has more.
    """
    wanted = -(-WAVES * arch.processors // max(programs, 1))
    return max(min(wanted, keys // LEAST_KEYS, MOST_PARTS), 1)
