"""What all parallel layers share: the tensor-parallel group, sizes, loading and weight formats.

    slice i of the outputs has F_i rows in the checkpoint and P_i on this rank
    copies of it among the ranks: c_i = tp_size · P_i / F_i;  this rank has piece  tp_rank // c_i

A column-parallel slice has P = F / tp_size (one copy), an unsharded one P = F (tp_size copies), and
KV heads that are fewer than ranks lie in between. Inputs are cut in the same way. Collectives are
torch's functional ones, so Dynamo captures them as ops of the graph.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, TypedDict

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from lorafx.errors import CheckpointError, ConfigError
from lorafx.torch_internals.graph_parts import c10d
from lorafx.weights.loadable_layers import LoadableLayer, WeightMethod


class QuantizeMethodBase(WeightMethod, ABC):
    """Base class of weight formats. `layer` is a layer of this package, or any module that has what
    `create_weights` registers. A method is stateless, so layers may share it."""

    @abstractmethod
    def create_weights(self, layer: Any, device: torch.device | str | None = None) -> None:
        """Register the layer's weight parameters by `layer.add_weight`. The layer's sizes of this
        rank are (output_size_per_partition, input_size_per_partition), its dtype `params_dtype`."""

    @abstractmethod
    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x (…, K) → (…, N), with `bias` (N,) added."""

    @abstractmethod
    def dequantize(self, layer: Any) -> Tensor:
        """The dense weight (N, K) that `apply` multiplies by, in the layer's `params_dtype`."""

    def incoming(self, layer: Any, name: str, loaded: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Parameters and their values, of the checkpoint's sizes, that a checkpoint tensor for the
        parameter `name` becomes; the layer cuts them to this rank afterwards."""
        yield name, loaded

    def fills(self, layer: Any, name: str, dtype: torch.dtype) -> tuple[str, ...]:
        """Names of the parameters that `incoming` gives for a tensor of this dtype."""
        return (name,)


class UnquantizedLinearMethod(QuantizeMethodBase):
    """y = x Wᵀ + b, with a dense weight (N, K) in `params_dtype`; N, K are this rank's sizes."""

    def create_weights(self, layer: Any, device: torch.device | str | None = None) -> None:
        shape = layer.output_size_per_partition, layer.input_size_per_partition
        weight = torch.empty(shape, dtype=layer.params_dtype, device=device)
        # Uninitialised memory may hold NaN, which would spread before the model is loaded.
        bound = layer.input_size**-0.5
        nn.init.uniform_(weight, -bound, bound)
        layer.add_weight("weight", weight, output_dim=0, input_dim=1)

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return F.linear(x, layer.weight, bias)

    def dequantize(self, layer: Any) -> Tensor:
        return layer.weight.detach()


class Int8ChannelLinearMethod(QuantizeMethodBase):
    """y = (x Qᵀ) · s + b, W ≈ s · Q: symmetric, weight Q (N, K) int8, weight_scale s (N,) float32.
    Whole rows of dense checkpoints are quantised before they are cut, so that scales do not depend
    on ranks."""

    def create_weights(self, layer: Any, device: torch.device | str | None = None) -> None:
        shape = layer.output_size_per_partition, layer.input_size_per_partition
        weight = torch.zeros(shape, dtype=torch.int8, device=device)
        scale = torch.ones(shape[0], dtype=torch.float32, device=device)
        layer.add_weight("weight", weight, output_dim=0, input_dim=1)
        layer.add_weight("weight_scale", scale, output_dim=0)

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        y = F.linear(x, layer.weight.to(x.dtype)) * layer.weight_scale.to(x.dtype)
        return y if bias is None else y + bias

    def dequantize(self, layer: Any) -> Tensor:
        weight = layer.weight.float() * layer.weight_scale.float()[:, None]
        return weight.to(layer.params_dtype)

    def incoming(self, layer: Any, name: str, loaded: Tensor) -> Iterator[tuple[str, Tensor]]:
        if name == "weight" and loaded.is_floating_point():
            weight, scale = quantize_int8(loaded)
            yield "weight", weight
            yield "weight_scale", scale
        elif name == "weight" and loaded.dtype != torch.int8:
            raise CheckpointError(
                f"an int8 weight is loaded from int8 or floating-point numbers, got {loaded.dtype}"
            )
        else:
            yield name, loaded

    def fills(self, layer: Any, name: str, dtype: torch.dtype) -> tuple[str, ...]:
        if name == "weight" and dtype.is_floating_point:
            return ("weight", "weight_scale")
        return (name,)


def quantize_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """W (…, N, K) → Q (…, N, K) int8, s (…, N) float32, with |W − s · Q| ≤ s / 2."""
    dense = weight.detach().float()
    scale = dense.abs().amax(dim=-1) / 127
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    return torch.round(dense / scale[..., None]).to(torch.int8), scale


@dataclass(frozen=True)
class TensorParallel:
    """A tensor-parallel group by its name: unlike process groups, models can be pickled."""

    size: int = 1
    rank: int = 0
    group_name: str | None = None

    @classmethod
    def of(cls, group: dist.ProcessGroup | None = None) -> TensorParallel:
        """The given group, or all ranks, or one rank without torch.distributed. ConfigError if this
        process is not in `group`."""
        if not dist.is_available() or not dist.is_initialized():
            return cls()
        rank = dist.get_rank(group)
        if rank < 0:
            raise ConfigError(
                "this process is not a member of the given tensor-parallel group; build the layer "
                "on the group's ranks alone, or with a tp_group that this rank is in"
            )
        size = dist.get_world_size(group)
        if size == 1:
            return cls()
        group = dist.group.WORLD if group is None else group
        assert group is not None
        return cls(size, rank, group.group_name)

    def all_reduce(self, y: Tensor) -> Tensor:
        if self.size == 1:
            return y
        return c10d.wait_tensor(c10d.all_reduce(y.contiguous(), "sum", self.group_name))

    def all_gather(self, y: Tensor) -> Tensor:
        """(…, N) of each rank → (…, size · N), in the order of the ranks."""
        if self.size == 1:
            return y
        # The op stacks along the first dimension, so it gets a new one.
        y = y.contiguous().unsqueeze(0)
        gathered = c10d.wait_tensor(c10d.all_gather_into_tensor(y, self.size, self.group_name))
        return gathered.movedim(0, -2).flatten(-2)

    def part(self, total: int, what: str, layer: str) -> int:
        """`total` divided by the number of ranks. ConfigError if it is not divisible."""
        if total % self.size:
            raise ConfigError(
                f"{layer}: {what} = {total} cannot be divided among tp_size = {self.size} ranks"
            )
        return total // self.size


class LayerOptions(TypedDict, total=False):
    """Keyword arguments that all layers take."""

    params_dtype: torch.dtype | None
    device: torch.device | str | None
    quant_method: QuantizeMethodBase | None
    prefix: str
    tp_group: dist.ProcessGroup | None
    disable_tp: bool


def label_of(layer: object, options: LayerOptions) -> str:
    prefix, name = options.get("prefix"), type(layer).__name__
    return f"{prefix} ({name})" if prefix else name


def group_of(options: LayerOptions) -> TensorParallel:
    if options.get("disable_tp", False):
        return TensorParallel()
    return TensorParallel.of(options.get("tp_group"))


def checked_sizes(layer: str, **sizes: int) -> None:
    for name, size in sizes.items():
        if not isinstance(size, int) or isinstance(size, bool) or size <= 0:
            raise ConfigError(f"{layer}: {name} must be a positive integer, got {size!r}")


ShardId = str | int | tuple[int, ...] | None


class ShardSizes(NamedTuple):
    """The sizes of a layer as checkpoints have them, and this rank's part of each."""

    input_size: int
    output_sizes: Sequence[int]
    input_part: int
    output_parts: Sequence[int]


class ParallelLayer(LoadableLayer):
    """Base of the layers that hold one 2-D weight (N, K), in one or several output slices.

    Attributes:
        input_size, output_size: K and N of the whole layer, as checkpoints have them.
        output_sizes: rows of each output slice in checkpoints; N is their sum.
        input_size_per_partition, output_size_per_partition, output_partition_sizes: the same on
            this rank.
        params_dtype: dtype of unquantised weights, and of activations.
        quant_method: stores the weight and computes with it.
        prefix: the layer's name in the model, for messages; may be empty.
    """

    weight: Tensor
    bias: Tensor | None
    #: Present if there are several ranks.
    local_product: LocalProduct

    #: Slice indices by the names that loaders may give them.
    shard_names: ClassVar[dict[str, int]] = {}

    def __init__(
        self, cut: ShardSizes, bias: bool, tp: TensorParallel, options: LayerOptions
    ) -> None:
        super().__init__()
        self.tp = tp
        self.tp_size, self.tp_rank = tp.size, tp.rank
        self.prefix = options.get("prefix", "")
        self.input_size, self.output_size = cut.input_size, sum(cut.output_sizes)
        self.output_sizes = tuple(cut.output_sizes)
        self.input_size_per_partition = cut.input_part
        self.output_partition_sizes = tuple(cut.output_parts)
        self.output_size_per_partition = sum(cut.output_parts)
        self.params_dtype = options.get("params_dtype") or torch.get_default_dtype()
        device, quant_method = options.get("device"), options.get("quant_method")
        self.quant_method = UnquantizedLinearMethod() if quant_method is None else quant_method
        self.quant_method.create_weights(self, device)
        if bias:
            rows = self.output_size_per_partition
            zeros = torch.zeros(rows, dtype=self.params_dtype, device=device)
            self.add_weight("bias", zeros, output_dim=0)
        else:
            self.register_parameter("bias", None)
        if tp.size > 1:
            self.local_product = LocalProduct()

    def product(self, x: Tensor) -> Tensor:
        """This rank's x (…, K), or ids (…), → this rank's (…, N), before any collective."""
        if self.tp_size == 1:
            return self.compute(x)
        return self.local_product(x, self)

    def compute(self, x: Tensor) -> Tensor:
        return self.quant_method.apply(self, x, self.own_bias)

    @property
    def own_bias(self) -> Tensor | None:
        return self.bias

    @property
    def compute_dtype(self) -> torch.dtype:
        """The dtype of activations, also where the weight is stored in another."""
        return self.params_dtype

    def slices(self, shard_id: ShardId = None) -> tuple[int, ...]:
        """Indices of the output slices of a shard id: a name ("q"), an index, a tuple of them, or
        None for all slices. Raises CheckpointError for an unknown slice."""
        count = len(self.output_sizes)
        if shard_id is None:
            return tuple(range(count))
        ids = shard_id if isinstance(shard_id, tuple) else (shard_id,)
        slices = [self.shard_names.get(i, -1) if isinstance(i, str) else int(i) for i in ids]
        if not slices or not set(slices) <= set(range(count)) or len(set(slices)) != len(slices):
            known = [*map(repr, self.shard_names), *map(str, range(count))]
            raise CheckpointError(
                f"{self.label}: no shard id {shard_id!r}; its {count} slices of "
                f"{self.output_sizes} rows are {', '.join(known)}, and tuples of them"
            )
        return tuple(slices)

    def pieces(self, name: str, shard_id: ShardId = None) -> frozenset[Any]:
        slices = self.slices(shard_id)
        return frozenset(slices if len(self.output_sizes) > 1 else [None])

    def fills(self, name: str, dtype: torch.dtype) -> tuple[str, ...]:
        return self.quant_method.fills(self, name, dtype)

    def checkpoint_shape(self, name: str, shard_id: ShardId = None) -> tuple[int, ...]:
        slices = self.slices(shard_id)
        shape = list(self.get_parameter(name).shape)
        cut_dims = self.cut_dims.get(name, {})
        if "output_dim" in cut_dims:
            shape[cut_dims["output_dim"]] = sum(self.output_sizes[i] for i in slices)
        if "input_dim" in cut_dims:
            shape[cut_dims["input_dim"]] = self.input_size
        return tuple(shape)

    def _load(self, name: str, loaded: Tensor, shard_id: ShardId) -> None:
        slices = self.slices(shard_id)
        for target, value in self.quant_method.incoming(self, name, loaded):
            self._write(target, value, slices)

    def piece_of_output(self, value: Tensor, index: int, dim: int) -> Tensor:
        """This rank's part of output slice `index`, which `value` holds whole along `dim`."""
        return self._piece(value, dim, self.output_sizes[index], self.output_partition_sizes[index])

    def piece_of_input(self, value: Tensor, dim: int) -> Tensor:
        return self._piece(value, dim, self.input_size, self.input_size_per_partition)

    def _piece(self, value: Tensor, dim: int, whole: int, part: int) -> Tensor:
        if part == whole:
            return value
        copies = max(1, self.tp_size * part // whole)
        start = min(self.tp_rank // copies * part, whole)
        length = min(part, whole - start)  # the padded end of a vocabulary has less
        return value.narrow(dim, start, length)

    def _write(self, name: str, value: Tensor, slices: tuple[int, ...]) -> None:
        cut_dims = self.cut_dims.get(name, {})
        target = self.get_parameter(name).data
        if "input_dim" in cut_dims:
            dim = cut_dims["input_dim"]
            value = self.piece_of_input(value, dim)
            target = _padded(target, dim, value.shape[dim])
        if "output_dim" not in cut_dims:
            target.copy_(value)
            return
        dim = cut_dims["output_dim"]
        sizes = [self.output_sizes[i] for i in slices]
        for index, rows in zip(slices, value.split(sizes, dim), strict=True):
            first = sum(self.output_partition_sizes[:index])
            part = target.narrow(dim, first, self.output_partition_sizes[index])
            piece = self.piece_of_output(rows, index, dim)
            _padded(part, dim, piece.shape[dim]).copy_(piece)

    def _apply(self, fn: Any, recurse: bool = True) -> ParallelLayer:
        super()._apply(fn, recurse)
        # .to(dtype) changes the dtype of activations as well.
        self.params_dtype = fn(torch.empty(0, dtype=self.params_dtype)).dtype
        return self

    def extra_repr(self) -> str:
        return (
            f"input_size={self.input_size}, output_sizes={self.output_sizes}, "
            f"bias={self.bias is not None}, tp_size={self.tp_size}, "
            f"quant_method={type(self.quant_method).__name__}"
        )


class LocalProduct(nn.Module):
    """This rank's product of a layer as a module call, so that hooks see it before ranks are
    combined. The delta is sharded like the weight, so it is added here."""

    def forward(self, x: Tensor, layer: ParallelLayer) -> Tensor:
        return layer.compute(x)


def _padded(target: Tensor, dim: int, length: int) -> Tensor:
    """The first `length` entries of `target`; the others, which are padding, become zero."""
    size = target.shape[dim]
    if length == size:
        return target
    target.narrow(dim, length, size - length).zero_()
    return target.narrow(dim, 0, length)
