"""Layers that write checkpoint tensors into their parameters themselves.

    layer.load_weight(name, loaded_weight, shard_id)

writes a tensor of the whole layer's sizes into this rank's part of a parameter, or of the piece of
it that the shard id names.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lorafx.errors import CheckpointError

if TYPE_CHECKING:
    from lorafx.weights.weight_places import Target


class WeightMethod:
    """What stores the weights of a layer: its `quant_method`."""

    def process_weights_after_loading(self, layer: Any) -> None:
        """Called by `load_weights` after every load of the layer's weights; does nothing here."""


def methods_of(filled: Iterable[Target]) -> list[tuple[nn.Module, WeightMethod]]:
    """The modules that hold these targets and store their weights by a method, with it."""
    modules = {id(target.module): target.module for target in filled}.values()
    found = [(module, getattr(module, "quant_method", None)) for module in modules]
    return [(module, method) for module, method in found if isinstance(method, WeightMethod)]


class LoadableLayer(nn.Module):
    """Base of layers whose subclasses define the shapes and shard ids of parameters;
    `output_sizes`: rows of output slices in checkpoints; `prefix`: the layer's name in messages."""

    prefix: str = ""
    output_sizes: tuple[int, ...] = ()

    def __init__(self) -> None:
        super().__init__()
        #: By a parameter's name: which of its dimensions are cut among ranks.
        self.cut_dims: dict[str, dict[str, int]] = {}

    def add_weight(self, name: str, value: Tensor, **cut_dims: int) -> None:
        """Register a parameter; `output_dim` and `input_dim` are its dimensions that hold outputs
        and inputs, of which this rank may have a part."""
        self.register_parameter(name, nn.Parameter(value, requires_grad=False))
        self.cut_dims[name] = cut_dims

    @abstractmethod
    def checkpoint_shape(self, name: str, shard_id: Any = None) -> tuple[int, ...]:
        """The shape of the checkpoint tensor for this shard; CheckpointError without one."""

    @abstractmethod
    def pieces(self, name: str, shard_id: Any = None) -> frozenset[Any]:
        """What a shard id fills of a parameter, in units that cannot be loaded by halves."""

    @abstractmethod
    def _load(self, name: str, loaded: Tensor, shard_id: Any) -> None: ...

    def fills(self, name: str, dtype: torch.dtype) -> tuple[str, ...]:
        """The parameters that a checkpoint tensor of this dtype for `name` gives values to."""
        return (name,)

    def load_weight(self, name: str, loaded_weight: Tensor, shard_id: Any = None) -> None:
        """Write a checkpoint tensor, of the whole layer's sizes, into this rank's parameter `name`,
        or its piece `shard_id`. CheckpointError for another name, shape, dtype or shard."""
        self.check_weight(name, loaded_weight.shape, shard_id)
        with torch.no_grad():
            self._load(name, loaded_weight, shard_id)

    def check_weight(self, name: str, shape: Sequence[int], shard_id: Any = None) -> None:
        """Raise CheckpointError where a checkpoint tensor of this shape cannot be loaded."""
        param = self._parameters.get(name)
        if param is None:
            raise CheckpointError(f"{self.label} has no parameter {name!r}")
        expected = self.checkpoint_shape(name, shard_id)
        where = f"{self.prefix or type(self).__name__}.{name}"
        if param.is_meta:
            raise CheckpointError(
                f"{where} is on the meta device and holds no values; call to_empty(device=...) on "
                "the model before loading"
            )
        if tuple(shape) != expected:
            which = "" if shard_id is None else f" (shard id {shard_id!r})"
            raise CheckpointError(
                f"{where}{which}: the checkpoint's tensor has shape {tuple(shape)}, expected "
                f"{expected}; the parameter has {tuple(param.shape)}"
            )

    @property
    def label(self) -> str:
        return f"{self.prefix} ({type(self).__name__})" if self.prefix else type(self).__name__
