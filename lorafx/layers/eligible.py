"""The registry entries of the parallel layers: sizes on this rank, output slices, sharding.

Each class has an entry of its own, so that an out-of-tree class can stand in for any of them.
FusedMoE is known as experts, whose weights are told by their shapes (lorafx.model.experts).
"""

from __future__ import annotations

from torch import nn

from lorafx.layers.embedding import ParallelLMHead, VocabParallelEmbedding
from lorafx.layers.linear import (
    ColumnParallelLinear,
    LinearBase,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)
from lorafx.layers.moe import FusedMoE
from lorafx.layers.sharding import DownSharding, GateUpSharding, LayerSharding
from lorafx.registry import register

LINEARS: tuple[type[nn.Module], ...] = (
    LinearBase,
    ReplicatedLinear,
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
    ParallelLMHead,
)
#: What computes several projections at once.
PACKED = (MergedColumnParallelLinear, QKVParallelLinear)


def register_layers() -> None:
    """Make all layers eligible."""
    sharding = LayerSharding()
    for cls in LINEARS:
        register(
            cls,
            in_features="input_size_per_partition",
            out_features="output_size_per_partition",
            output_sizes="output_partition_sizes",
            sharding=sharding,
            packed=issubclass(cls, PACKED),
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
