"""The ops that stand around a layer, and in the places of its repeats, while AOTAutograd traces a
graph: `fold` puts them there, and `unfold` takes them out. Compiled graphs have none.

    layer_begin   x, and what else the layer takes     →   x
    layer_end     what the layer gives                 →   the same
    layer_again   what a repeat of the layer takes     →   tensors like those that the layer gives
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lorafx.kernels.ops.op_library import define


def _like(tensor: Tensor) -> Tensor:
    return torch.empty_strided(
        tensor.size(), tensor.stride(), dtype=tensor.dtype, device=tensor.device
    )


def _copy(tensor: Tensor) -> Tensor:
    return _like(tensor).copy_(tensor)


def layer_begin(x: Tensor, operands: Sequence[Tensor], layer: int) -> Tensor:
    """A copy of x, the only operand that the layer reads by this op's result."""
    return _copy(x)


def layer_end(results: Sequence[Tensor], operands: Sequence[Tensor], layer: int) -> list[Tensor]:
    """Copies of the results. `operands` are those of `layer_begin`, as the layer leaves them."""
    return [_copy(result) for result in results]


def layer_again(
    operands: Sequence[Tensor], like: Sequence[Tensor], layer: int, repeat: int
) -> list[Tensor]:
    """Zeros like the results of the layer, which `unfold` replaces by those of this repeat."""
    return [_like(result).zero_() for result in like]


define(
    "layer_begin(Tensor x, Tensor[] operands, int layer) -> Tensor",
    layer_begin,
    lambda x, *_: _like(x),
    lowered=True,
)
define(
    "layer_end(Tensor[] results, Tensor[] operands, int layer) -> Tensor[]",
    layer_end,
    lambda results, *_: [_like(result) for result in results],
    lowered=True,
)
define(
    "layer_again(Tensor[] operands, Tensor[] like, int layer, int repeat) -> Tensor[]",
    layer_again,
    lambda operands, like, *_: [_like(result) for result in like],
    lowered=True,
)
LAYER_BEGIN = torch.ops.lorafx.layer_begin.default
LAYER_END = torch.ops.lorafx.layer_end.default
LAYER_AGAIN = torch.ops.lorafx.layer_again.default
