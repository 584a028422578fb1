"""The registry entries of the parallel layers, and this rank's share of a delta.

    ΔW = B A,   W cut into W_rank:   ΔW_rank = B_rank A_rank

    outputs cut (column, QKV, head)   B_rank = rows of B,      A_rank = A
    inputs cut (row)                  B_rank = B,              A_rank = columns of A
    vocabulary of an embedding cut    B_rank = B,              A_rank = columns of A (r, V)
    experts: gate and up of all       B_rank = rows of B (E, I, r) of each,  A_rank = A
    experts: down of all              B_rank = B,              A_rank = columns of A (E, r, I)

Rows that pad a vocabulary get zeros. Each class has an entry, so that an out-of-tree class can
replace any of them.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorafx.layers.linear import (
    ColumnParallelLinear,
    LinearBase,
    MergedColumnParallelLinear,
    ParallelLMHead,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
)
from lorafx.layers.moe import FusedMoE
from lorafx.registry import register


class LayerSharding:
    def saved_sizes(self, layer: Any) -> tuple[int, tuple[int, ...]]:
        if _is_embedding(layer):
            return layer.output_size, (layer.input_size,)
        return layer.input_size, layer.output_sizes

    def cut(
        self, layer: Any, slices: tuple[int, ...], A: Tensor, B: Tensor
    ) -> tuple[Tensor, Tensor]:
        """A (r, K), of an embedding (r, V), and B (N, r), N the rows of `slices` in checkpoints."""
        if _is_embedding(layer):
            columns = layer.piece_of_output(A, 0, dim=1)
            return F.pad(columns, (0, layer.output_size_per_partition - columns.shape[1])), B
        rows = B.split([layer.output_sizes[i] for i in slices], dim=0)
        pieces = [
            layer.piece_of_output(part, i, dim=0) for i, part in zip(slices, rows, strict=True)
        ]
        padding = sum(layer.output_partition_sizes[i] for i in slices) - sum(map(len, pieces))
        return layer.piece_of_input(A, dim=1), F.pad(torch.cat(pieces), (0, 0, 0, padding))

    def product(self, layer: Any) -> nn.Module:
        return layer if layer.tp_size == 1 else layer.local_product


class GateUpSharding:
    """Sharding of `FusedMoE.w13_weight`, whose slices are gate and up."""

    def saved_sizes(self, layer: Any) -> tuple[int, tuple[int, ...]]:
        return layer.hidden_size, (layer.intermediate_size, layer.intermediate_size)

    def cut(
        self, layer: Any, slices: tuple[int, ...], A: Tensor, B: Tensor
    ) -> tuple[Tensor, Tensor]:
        """A (E, r, H), B (E, I, r)."""
        return A, layer.own_inner(B, dim=-2)

    def product(self, layer: Any) -> nn.Module:
        """The layer: its products are found in the graph, before the ranks' results are summed."""
        return layer


class DownSharding(GateUpSharding):
    """Sharding of `FusedMoE.w2_weight`, whose inputs are cut."""

    def saved_sizes(self, layer: Any) -> tuple[int, tuple[int, ...]]:
        return layer.intermediate_size, (layer.hidden_size,)

    def cut(
        self, layer: Any, slices: tuple[int, ...], A: Tensor, B: Tensor
    ) -> tuple[Tensor, Tensor]:
        """A (E, r, I), B (E, H, r)."""
        return layer.own_inner(A, dim=-1), B


def _is_embedding(layer: nn.Module) -> bool:
    return isinstance(layer, VocabParallelEmbedding) and not isinstance(layer, ParallelLMHead)


LINEARS: tuple[type[nn.Module], ...] = (
    LinearBase,
    ReplicatedLinear,
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
    ParallelLMHead,
)


def register_layers() -> None:
    sharding = LayerSharding()
    for cls in LINEARS:
        register(
            cls,
            in_features="input_size_per_partition",
            out_features="output_size_per_partition",
            output_sizes="output_partition_sizes",
            sharding=sharding,
        )
    register(
        VocabParallelEmbedding,
        kind="embedding",
        in_features="num_embeddings_per_partition",
        out_features="embedding_dim",
        sharding=sharding,
    )
    register(
        FusedMoE,
        kind="experts",
        in_features="hidden_size",
        out_features="intermediate_size",
        weight="w13_weight",
        sharding={"w13_weight": GateUpSharding(), "w2_weight": DownSharding()},
    )
