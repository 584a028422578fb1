"""Linear layers, embedding and head for models to serve, with weights sharded over ranks.

    replicated   every rank computes y = x Wᵀ + b (…, N)
    column       a rank computes its part of the outputs (…, N / tp_size), gathered on request
    row          a rank multiplies its part of the inputs; y = Σ_rank x_rank W_rankᵀ + b
    embedding    y = Σ_rank [ids of this rank] · W_rank[ids − first_rank]
    head         logits = [x W_0ᵀ; x W_1ᵀ; ...]

Of W (V, D) of the last two, rank i holds the rows [i · P, (i + 1) · P), P = ⌈V / tp_size⌉. Rows of
zeros pad W if V is not divisible; their logits are cut off.

Constructors take, beside the sizes: `params_dtype`, `device`, `quant_method`, `prefix` (the layer's
name, for messages), `tp_group` (a process group instead of all ranks) and `disable_tp` (one rank).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

import torch
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


class LinearBase(ParallelLayer):
    def forward(self, x: Tensor) -> Tensor:
        return self.product(x)


class ReplicatedLinear(LinearBase):
    """x (…, input_size) → (…, output_size), the whole weight on every rank."""

    def __init__(
        self, input_size: int, output_size: int, bias: bool = True, **options: Unpack[LayerOptions]
    ) -> None:
        checked_sizes(label_of(self, options), input_size=input_size, output_size=output_size)
        cut = ShardSizes(input_size, [output_size], input_size, [output_size])
        super().__init__(cut, bias, group_of(options), options)


class ColumnParallelLinear(LinearBase):
    """x (…, input_size) → (…, output_size / tp_size), the outputs cut among the ranks, or with
    `gather_output` all on every rank. ConfigError for sizes that the ranks cannot divide."""

    def __init__(
        self,
        input_size: int,
        output_size: int,
        bias: bool = True,
        *,
        gather_output: bool = False,
        **options: Unpack[LayerOptions],
    ) -> None:
        self._build(input_size, {"output_size": output_size}, bias, gather_output, options)

    def _build(
        self,
        input_size: int,
        sizes: Mapping[str, int],
        bias: bool,
        gather_output: bool,
        options: LayerOptions,
    ) -> None:
        """`sizes`: rows of the slices in checkpoints, by their names in messages."""
        label, tp = label_of(self, options), group_of(options)
        checked_sizes(label, input_size=input_size, slices=len(sizes), **sizes)
        parts = [tp.part(size, name, label) for name, size in sizes.items()]
        cut = ShardSizes(input_size, [*sizes.values()], input_size, parts)
        LinearBase.__init__(self, cut, bias, tp, options)
        self.gather_output = gather_output

    def forward(self, x: Tensor) -> Tensor:
        y = self.product(x)
        return self.gathered(y) if self.gather_output else y

    def gathered(self, y: Tensor) -> Tensor:
        """This rank's outputs (…, Σ P_i) → all of them (…, Σ F_i), slice after slice."""
        if self.tp_size == 1:
            return y
        slices = y.split(list(self.output_partition_sizes), dim=-1)
        return torch.cat([self._gather(index, part) for index, part in enumerate(slices)], dim=-1)

    def _gather(self, index: int, part: Tensor) -> Tensor:
        gathered = self.tp.all_gather(part)
        copies = gathered.shape[-1] // self.output_sizes[index]
        if copies == 1:
            return gathered
        pieces = gathered.unflatten(-1, (self.tp_size, -1))[..., ::copies, :]
        return pieces.flatten(-2)


class MergedColumnParallelLinear(ColumnParallelLinear):
    """Several column-parallel linears of one input: y = [x W_0ᵀ; x W_1ᵀ; ...] + b. Slice i has
    output_sizes[i] rows in checkpoints and shard id i."""

    def __init__(
        self,
        input_size: int,
        output_sizes: Sequence[int],
        bias: bool = True,
        *,
        gather_output: bool = False,
        **options: Unpack[LayerOptions],
    ) -> None:
        sizes = {f"output_sizes[{i}]": size for i, size in enumerate(output_sizes)}
        self._build(input_size, sizes, bias, gather_output, options)


class QKVParallelLinear(ColumnParallelLinear):
    """Query, key and value projections of attention in one: y = [q; k; v], heads cut among ranks.

    Where there are fewer KV heads than ranks, each is held by tp_size / total_num_kv_heads ranks.

    Args:
        hidden_size: size of x.
        head_size: size of a query, key and value head.
        total_num_heads, total_num_kv_heads: heads of the whole layer; as many KV heads as query
            heads unless given.
        v_head_size: size of a value head; `head_size` unless given.

    Attributes:
        num_heads, num_kv_heads: heads on this rank.
        num_kv_head_replicas: ranks that hold the same KV head.

    Raises ConfigError for heads that cannot be divided among the ranks.
    """

    shard_names: ClassVar[dict[str, int]] = {"q": 0, "k": 1, "v": 2}

    def __init__(
        self,
        hidden_size: int,
        head_size: int,
        total_num_heads: int,
        total_num_kv_heads: int | None = None,
        bias: bool = True,
        *,
        v_head_size: int | None = None,
        gather_output: bool = False,
        **options: Unpack[LayerOptions],
    ) -> None:
        label = label_of(self, options)
        kv_heads = total_num_heads if total_num_kv_heads is None else total_num_kv_heads
        v_size = head_size if v_head_size is None else v_head_size
        checked_sizes(
            label,
            hidden_size=hidden_size,
            head_size=head_size,
            v_head_size=v_size,
            total_num_heads=total_num_heads,
            total_num_kv_heads=kv_heads,
        )
        tp = group_of(options)
        heads = tp.part(total_num_heads, "total_num_heads", label)
        if tp.size > kv_heads and tp.size % kv_heads == 0:
            own_kv_heads, replicas = 1, tp.size // kv_heads
        else:
            own_kv_heads, replicas = tp.part(kv_heads, "total_num_kv_heads", label), 1
        sizes = [total_num_heads * head_size, kv_heads * head_size, kv_heads * v_size]
        parts = [heads * head_size, own_kv_heads * head_size, own_kv_heads * v_size]
        cut = ShardSizes(hidden_size, sizes, hidden_size, parts)
        LinearBase.__init__(self, cut, bias, tp, options)
        self.gather_output = gather_output
        self.hidden_size, self.head_size, self.v_head_size = hidden_size, head_size, v_size
        self.total_num_heads, self.total_num_kv_heads = total_num_heads, kv_heads
        self.num_heads, self.num_kv_heads = heads, own_kv_heads
        self.num_kv_head_replicas = replicas


class RowParallelLinear(LinearBase):
    """x (…, input_size / tp_size) → (…, output_size), the inputs cut among the ranks.

    Args:
        input_is_parallel: x is this rank's part already; else x is whole and cut here.
        reduce_results: sum over the ranks. Without it the rank's own term is returned, and rank 0
            alone adds the bias.

    Raises ConfigError for sizes that cannot be divided among the ranks.
    """

    def __init__(
        self,
        input_size: int,
        output_size: int,
        bias: bool = True,
        *,
        input_is_parallel: bool = True,
        reduce_results: bool = True,
        **options: Unpack[LayerOptions],
    ) -> None:
        label = label_of(self, options)
        checked_sizes(label, input_size=input_size, output_size=output_size)
        tp = group_of(options)
        part = tp.part(input_size, "input_size", label)
        cut = ShardSizes(input_size, [output_size], part, [output_size])
        super().__init__(cut, bias, tp, options)
        self.input_is_parallel, self.reduce_results = input_is_parallel, reduce_results

    def forward(self, x: Tensor) -> Tensor:
        y = self.product(self.own_input(x))
        return self.tp.all_reduce(y) if self.reduce_results else y

    @property
    def own_bias(self) -> Tensor | None:
        """The bias on rank 0, so that the sum over the ranks has it once."""
        return None if self.tp_rank else self.bias

    def own_input(self, x: Tensor) -> Tensor:
        return x if self.input_is_parallel else self.piece_of_input(x, -1)


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
        # The weight is (V, D): as in the head, its outputs are the vocabulary.
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
        """The rows of this rank's W, 0 for ids of other ranks; and which ids are of other ranks."""
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
