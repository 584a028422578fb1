"""Parallel layers for model authors: linears, embeddings and experts whose weights can be packed,
quantised and sharded over tensor-parallel ranks, and on which lorafx serves adapters.

See docs/layers.md. Importing this package makes its layers eligible for LoRA.
"""

from lorafx.layers.base import (
    Int8ChannelLinearMethod,
    QuantizeMethodBase,
    TensorParallel,
    UnquantizedLinearMethod,
)
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
from lorafx.layers.registered import register_layers
from lorafx.weights.loader import load_weights

__all__ = [
    "ColumnParallelLinear",
    "FusedMoE",
    "Int8ChannelLinearMethod",
    "LinearBase",
    "MergedColumnParallelLinear",
    "ParallelLMHead",
    "QKVParallelLinear",
    "QuantizeMethodBase",
    "ReplicatedLinear",
    "RowParallelLinear",
    "TensorParallel",
    "UnquantizedLinearMethod",
    "VocabParallelEmbedding",
    "load_weights",
]

register_layers()
