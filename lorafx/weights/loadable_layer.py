"""Layers whose parameters take checkpoint tensors through loaders of their own.

    param.weight_loader(param, loaded_weight, shard_id)

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

    def weight_loader(
        self, param: nn.Parameter, loaded_weight: Tensor, shard_id: Any = None
    ) -> None:
        """Write a checkpoint tensor, of the whole layer's sizes, into this rank's `param`, or its
        piece `shard_id`. CheckpointError for another shape, dtype or shard."""
        name = self.name_of(param)
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

    def name_of(self, param: nn.Parameter) -> str:
        """The name of one of the layer's own parameters; CheckpointError for any other."""
        for name, held in self._parameters.items():
            if held is param:
                return name
        raise CheckpointError(f"{self.label}: the given parameter is not one of this layer's")

    @property
    def label(self) -> str:
        return f"{self.prefix} ({type(self).__name__})" if self.prefix else type(self).__name__

    def _keep_attributes(self) -> None:
        self._weight_attributes = {
            name: {key: value for key, value in vars(param).items() if key != "weight_loader"}
            for name, param in self._parameters.items()
            if param is not None
        }

    def _mark_parameters(self) -> None:
        """Give the parameters their attributes back, which copies and replacements lack."""
        for name, attributes in self._weight_attributes.items():
            param = self._parameters.get(name)
            if param is not None:
                for key, value in attributes.items():
                    setattr(param, key, value)
                param.weight_loader = self.weight_loader  # type: ignore[attr-defined]

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._mark_parameters()

    def _apply(self, fn: Any, recurse: bool = True) -> LoadableLayer:
        super()._apply(fn, recurse)
        self._mark_parameters()
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._mark_parameters()
