"""Embedding and output head with the vocabulary cut among ranks.

    embedding   y = W[ids]:      y = Σ_rank [ids of this rank] · W_rank[ids − first_rank]
    head        logits = x Wᵀ:   logits = [x W_0ᵀ; x W_1ᵀ; ...]

W (V, D), of which rank i holds the rows [i · P, (i + 1) · P), P = ⌈V / tp_size⌉. A vocabulary that
does not divide is padded with rows of zeros at its end, whose logits are cut off.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor

from lorafx.errors import ConfigError
from lorafx.layers.base import (
    LayerOptions,
    ParallelLayer,
    ShardSizes,
    checked_sizes,
    group_of,
    label_of,
)

if TYPE_CHECKING:
    from typing_extensions import Unpack


class VocabParallelEmbedding(ParallelLayer):
    """ids (…) of any integer dtype → (…, embedding_dim); rows of W are cut among the ranks.

    Attributes:
        num_embeddings, embedding_dim: V and D.
        num_embeddings_per_partition: rows on this rank, padding included.
        first_index: the id of this rank's first row.

    Raises ConfigError for sizes that are not positive, or fewer embeddings than ranks.
    """

    def __init__(
        self, num_embeddings: int, embedding_dim: int, **options: Unpack[LayerOptions]
    ) -> None:
        self._build(num_embeddings, embedding_dim, False, options)

    def _build(
        self, num_embeddings: int, embedding_dim: int, bias: bool, options: LayerOptions
    ) -> None:
        label, tp = label_of(self, options), group_of(options)
        checked_sizes(label, num_embeddings=num_embeddings, embedding_dim=embedding_dim)
        if num_embeddings < tp.size:
            raise ConfigError(
                f"{label}: num_embeddings = {num_embeddings} is less than tp_size = {tp.size}"
            )
        rows = -(-num_embeddings // tp.size)
        # The weight is (V, D): its outputs, as those of the head, are the vocabulary.
        cut = ShardSizes(embedding_dim, [num_embeddings], embedding_dim, [rows])
        ParallelLayer.__init__(self, cut, bias, tp, options)
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.num_embeddings_per_partition = rows
        self.first_index = tp.rank * rows

    def forward(self, ids: Tensor) -> Tensor:
        if self.tp_size == 1:
            return self.product(ids)
        local, elsewhere = self.own_ids(ids)
        return self.tp.all_reduce(self.product(local).masked_fill(elsewhere.unsqueeze(-1), 0))

    def compute(self, x: Tensor) -> Tensor:
        return F.embedding(x, self.weight)

    def own_ids(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """(row of this rank's W, 0 where another rank has the id; which ids this rank has)."""
        local = ids - self.first_index
        elsewhere = (local < 0) | (local >= self.num_embeddings_per_partition)
        return local.masked_fill(elsewhere, 0), elsewhere


class ParallelLMHead(VocabParallelEmbedding):
    """x (…, embedding_dim) → logits (…, num_embeddings), with a bias if `bias`, on every rank."""

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        bias: bool = False,
        **options: Unpack[LayerOptions],
    ) -> None:
        self._build(num_embeddings, embedding_dim, bias, options)

    def forward(self, x: Tensor) -> Tensor:
        return self.gathered(self.product(x))

    def compute(self, x: Tensor) -> Tensor:
        return self.quant_method.apply(self, x, self.bias)

    def gathered(self, logits: Tensor) -> Tensor:
        """This rank's logits (…, P) → all of them (…, V), without the padding."""
        if self.tp_size == 1:
            return logits
        return self.tp.all_gather(logits)[..., : self.num_embeddings]
