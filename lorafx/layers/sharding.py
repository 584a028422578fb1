"""Which share of a low-rank update is this rank's, for layers cut among tensor-parallel ranks.

    ΔW = B A,   W cut into W_rank:   ΔW_rank = B_rank A_rank

    outputs cut (column, QKV, head)   B_rank = rows of B,      A_rank = A
    inputs cut (row)                  B_rank = B,              A_rank = columns of A
    vocabulary of an embedding cut    B_rank = B,              A_rank = columns of A (r, V)

Rows that pad a vocabulary get zeros.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorafx.layers.base import ParallelLayer
from lorafx.layers.embedding import ParallelLMHead, VocabParallelEmbedding


class LayerSharding:
    """`lorafx.registry.Sharding` of the parallel layers."""

    def saved_sizes(self, module: nn.Module) -> tuple[int, tuple[int, ...]]:
        """K and the rows of each output slice, as checkpoints have them."""
        layer = _layer(module)
        if _looks_up(layer):
            return layer.output_size, (layer.input_size,)
        return layer.input_size, layer.output_sizes

    def cut(
        self, module: nn.Module, slices: tuple[int, ...], A: Tensor, B: Tensor
    ) -> tuple[Tensor, Tensor]:
        """This rank's A and B of one part.

        Args:
            slices: the output slices that the part covers, in order.
            A: (r, K); of an embedding (r, V).
            B: (N, r), N the rows of those slices in checkpoints.
        """
        layer = _layer(module)
        if _looks_up(layer):
            own = layer.piece_of_output(A, 0, dim=1)
            return F.pad(own, (0, layer.output_size_per_partition - own.shape[1])), B
        rows = B.split([layer.output_sizes[i] for i in slices], dim=0)
        pieces = [
            layer.piece_of_output(part, i, dim=0) for i, part in zip(slices, rows, strict=True)
        ]
        padding = sum(layer.output_partition_sizes[i] for i in slices) - sum(map(len, pieces))
        return layer.piece_of_input(A, dim=1), F.pad(torch.cat(pieces), (0, 0, 0, padding))

    def product(self, module: nn.Module) -> nn.Module:
        """The call of this rank's product, which comes before the ranks' results are combined."""
        layer = _layer(module)
        return layer if layer.tp_size == 1 else layer.local_product


def _layer(module: nn.Module) -> ParallelLayer:
    assert isinstance(module, ParallelLayer)
    return module


def _looks_up(layer: ParallelLayer) -> bool:
    return isinstance(layer, VocabParallelEmbedding) and not isinstance(layer, ParallelLMHead)
