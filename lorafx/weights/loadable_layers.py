"""Layers that load their weights themselves, such as those of lorafx.layers: each writes tensors of
the whole layer's sizes into this rank's part of its parameters.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lorafx.errors import CheckpointError
from lorafx.model.module_graph import writing
from lorafx.weights.targets import (
    Part,
    Take,
    Target,
    WeightShape,
    dtype_refusal,
    same_memory,
)


class WeightMethod:
    """Stores the weights of a layer, as its `quant_method`."""

    def process_weights_after_loading(self, layer: Any) -> None:
        """`load_weights` calls it after every load of the layer's weights. Does nothing here."""


def methods_of(filled: Iterable[Target]) -> list[tuple[nn.Module, WeightMethod]]:
    """The modules of these targets whose weights a `WeightMethod` stores, each with its method."""
    modules = {id(target.module): target.module for target in filled}.values()
    methods = [(module, getattr(module, "quant_method", None)) for module in modules]
    return [(module, method) for module, method in methods if isinstance(method, WeightMethod)]


class LoadableLayer(nn.Module):
    """Base of layers whose subclasses define the shapes and shard ids of parameters.
    `output_sizes`: rows of output slices in checkpoints; `prefix`: the layer's name in messages."""

    prefix: str = ""
    output_sizes: tuple[int, ...] = ()

    def __init__(self) -> None:
        super().__init__()
        #: The dimensions of each parameter that are sharded over ranks.
        self.cut_dims: dict[str, dict[str, int]] = {}

    def add_weight(self, name: str, value: Tensor, **cut_dims: int) -> None:
        """Register a parameter. `output_dim` and `input_dim` are its dimensions of outputs and
        inputs, of which this rank may have a part."""
        self.register_parameter(name, nn.Parameter(value, requires_grad=False))
        self.cut_dims[name] = cut_dims

    @abstractmethod
    def checkpoint_shape(self, name: str, shard_id: Any = None) -> tuple[int, ...]:
        """The shape of the checkpoint tensor for this shard; CheckpointError if it is unknown."""

    @abstractmethod
    def pieces(self, name: str, shard_id: Any = None) -> frozenset[Any]:
        """The pieces of a parameter that a shard id fills, each of which is loaded as a whole."""

    @abstractmethod
    def _load(self, name: str, loaded: Tensor, shard_id: Any) -> None: ...

    def fills(self, name: str, dtype: torch.dtype) -> tuple[str, ...]:
        """The parameters that a checkpoint tensor of this dtype for `name` fills."""
        return (name,)

    def load_weight(self, name: str, loaded_weight: Tensor, shard_id: Any = None) -> None:
        """Write a checkpoint tensor, of the whole layer's sizes, into this rank's parameter `name`,
        or its piece `shard_id`. CheckpointError for another name, shape, dtype or shard."""
        self.check_weight(name, loaded_weight.shape, shard_id)
        with torch.no_grad():
            self._load(name, loaded_weight, shard_id)

    def check_weight(self, name: str, shape: Sequence[int], shard_id: Any = None) -> None:
        """Raise CheckpointError if a checkpoint tensor of this shape cannot be loaded."""
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


@dataclass(frozen=True, eq=False)
class Shard:
    """A shard id of a parameter of a `LoadableLayer`, which cuts checkpoint tensors itself."""

    target: Target
    shard_id: Any = None
    take: Take = ()

    @property
    def layer(self) -> LoadableLayer:
        assert isinstance(self.target.module, LoadableLayer)
        return self.target.module

    @property
    def shape(self) -> WeightShape:
        """The shape of the whole layer's tensor; CheckpointError for no such shard, or on meta."""
        shape = self.layer.checkpoint_shape(self.target.attribute, self.shard_id)
        self.layer.check_weight(self.target.attribute, shape, self.shard_id)
        return shape

    def fills(self, dtype: torch.dtype) -> Iterator[tuple[Target, Part]]:
        pieces = self.layer.pieces(self.target.attribute, self.shard_id)
        for name in self.layer.fills(self.target.attribute, dtype):
            yield Target(self.target.path, self.layer, name), pieces

    def is_at(self, tensor: Tensor) -> bool:
        return self.shard_id is None and same_memory(self.target.tensor, tensor)

    def refusal(self, tensor: Tensor) -> str:
        converted = len(self.layer.fills(self.target.attribute, tensor.dtype)) > 1
        return "" if converted else dtype_refusal(self.target.tensor, tensor)

    def write(self, loaded: Tensor) -> None:
        with writing(self.target.tensor):
            self.layer.load_weight(self.target.attribute, loaded, self.shard_id)
