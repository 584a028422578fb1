"""This rank's share of a delta, for layers sharded over tensor-parallel ranks.

    ΔW = B A,   W cut into W_rank:   ΔW_rank = B_rank A_rank

    outputs cut (column, QKV, head)   B_rank = rows of B,      A_rank = A
    inputs cut (row)                  B_rank = B,              A_rank = columns of A
    vocabulary of an embedding cut    B_rank = B,              A_rank = columns of A (r, V)
    experts: gate and up of all       B_rank = rows of B (E, I, r) of each,  A_rank = A
    experts: down of all              B_rank = B,              A_rank = columns of A (E, r, I)

Rows that pad a vocabulary get zeros.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorafx.layers.base import ParallelLayer
from lorafx.layers.embedding import ParallelLMHead, VocabParallelEmbedding
from lorafx.layers.moe import FusedMoE


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


class GateUpSharding:
    """`lorafx.registry.Sharding` of `FusedMoE.w13_weight`, whose slices are gate and up."""

    def saved_sizes(self, module: nn.Module) -> tuple[int, tuple[int, ...]]:
        """H and the rows of each half, as checkpoints have them."""
        layer = _experts(module)
        return layer.hidden_size, (layer.intermediate_size, layer.intermediate_size)

    def cut(
        self, module: nn.Module, slices: tuple[int, ...], A: Tensor, B: Tensor
    ) -> tuple[Tensor, Tensor]:
        """This rank's A and B of one half.

        Args:
            A: (E, r, H).
            B: (E, I, r).
        """
        return A, _experts(module).own_inner(B, dim=-2)

    def product(self, module: nn.Module) -> nn.Module:
        """The layer: its products are found in the graph, before the ranks' results are summed."""
        return module


class DownSharding(GateUpSharding):
    """The same of `FusedMoE.w2_weight`, whose inputs are cut."""

    def saved_sizes(self, module: nn.Module) -> tuple[int, tuple[int, ...]]:
        """I and H."""
        layer = _experts(module)
        return layer.intermediate_size, (layer.hidden_size,)

    def cut(
        self, module: nn.Module, slices: tuple[int, ...], A: Tensor, B: Tensor
    ) -> tuple[Tensor, Tensor]:
        """This rank's A and B.

        Args:
            A: (E, r, I).
            B: (E, H, r).
        """
        return _experts(module).own_inner(A, dim=-1), B


def _experts(module: nn.Module) -> FusedMoE:
    assert isinstance(module, FusedMoE)
    return module


def _layer(module: nn.Module) -> ParallelLayer:
    assert isinstance(module, ParallelLayer)
    return module


def _looks_up(layer: ParallelLayer) -> bool:
    return isinstance(layer, VocabParallelEmbedding) and not isinstance(layer, ParallelLMHead)
