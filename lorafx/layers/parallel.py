"""The tensor-parallel group of a layer, and the options that all layers take beside their sizes.

    all_reduce:  y = Σ_rank y_rank              all_gather:  y = [y_0; y_1; ...] over the last dim

Collectives are torch's functional ones, so Dynamo captures them as ops of the graph. A group is
kept by its name: process groups can be neither copied nor pickled, and models are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypedDict

import torch
import torch.distributed as dist
from torch import Tensor

from lorafx.errors import ConfigError
from lorafx.layers.quantization import QuantizeMethodBase
from lorafx.torch_internals.collectives import c10d

if TYPE_CHECKING:
    import torch.distributed as dist


@dataclass(frozen=True)
class TensorParallel:
    """Size and rank of a tensor-parallel group.

    Attributes:
        size: ranks in the group, `tp_size` of the layers.
        rank: this process's place in it, `tp_rank`.
        group_name: torch.distributed's name of the group; None where there is one rank.
    """

    size: int = 1
    rank: int = 0
    group_name: str | None = None

    @classmethod
    def of(cls, group: dist.ProcessGroup | None = None) -> TensorParallel:
        """The given group, or all ranks, or a single rank where torch.distributed is not set up.

        Raises:
            ConfigError: this process is not in `group`.
        """
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
        """The sum of the ranks' `y`, of the same shape, on every rank."""
        if self.size == 1:
            return y
        return c10d.wait_tensor(c10d.all_reduce(y.contiguous(), "sum", self.group_name))

    def all_gather(self, y: Tensor) -> Tensor:
        """(…, N) of each rank → (…, size · N), in the order of the ranks."""
        if self.size == 1:
            return y
        ops = c10d
        # The op stacks along the first dimension, whatever that is: give it one of its own.
        gathered = ops.wait_tensor(
            ops.all_gather_into_tensor(y.contiguous().unsqueeze(0), self.size, self.group_name)
        )
        return gathered.movedim(0, -2).flatten(-2)

    def part(self, total: int, what: str, layer: str) -> int:
        """`total` divided among the ranks.

        Raises:
            ConfigError: it does not divide.
        """
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
    """What messages call a layer that is being made."""
    prefix, name = options.get("prefix"), type(layer).__name__
    return f"{prefix} ({name})" if prefix else name


def group_of(options: LayerOptions) -> TensorParallel:
    """The tensor-parallel group of a layer."""
    if options.get("disable_tp", False):
        return TensorParallel()
    return TensorParallel.of(options.get("tp_group"))


def checked_sizes(layer: str, **sizes: int) -> None:
    """Sizes are positive integers.

    Raises:
        ConfigError: one is not.
    """
    for name, size in sizes.items():
        if not isinstance(size, int) or isinstance(size, bool) or size <= 0:
            raise ConfigError(f"{layer}: {name} must be a positive integer, got {size!r}")
