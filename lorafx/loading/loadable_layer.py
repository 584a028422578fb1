"""Layers whose parameters take checkpoint tensors through loaders of their own.

    param.weight_loader(param, loaded_weight, shard_id)

writes a tensor of the whole layer's sizes into this rank's part of a parameter, or of the piece of
it that the shard id names. `load_weights` asks the layer what a tensor should look like before.
Shard ids of routed experts are ("w1", e) the gate, ("w3", e) the up and ("w2", e) the down
projection of expert e.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lorafx.errors import CheckpointError


class LoadableLayer(nn.Module):
    """Base of the layers; a subclass says which shapes and shard ids its parameters take.

    Attributes:
        prefix: the layer's name in the model, for messages; may be empty.
        output_sizes: rows of each output slice in checkpoints; () where it has none.
    """

    prefix: str = ""
    output_sizes: tuple[int, ...] = ()

    @abstractmethod
    def checkpoint_shape(self, name: str, shard_id: Any = None) -> tuple[int, ...]:
        """The shape of the checkpoint tensor for this shard of a parameter.

        Raises:
            CheckpointError: there is no such shard.
        """

    @abstractmethod
    def pieces(self, name: str, shard_id: Any = None) -> frozenset[Any]:
        """What a shard id fills of a parameter, in units that cannot be loaded by halves."""

    @abstractmethod
    def _load(self, name: str, loaded: Tensor, shard_id: Any) -> None:
        """Write a tensor of the right shape."""

    def fills(self, name: str, dtype: torch.dtype) -> tuple[str, ...]:
        """The parameters that a checkpoint tensor of this dtype for `name` gives values to."""
        return (name,)

    def weight_loader(
        self, param: nn.Parameter, loaded_weight: Tensor, shard_id: Any = None
    ) -> None:
        """Write a checkpoint tensor, of the whole layer's sizes, into this rank's parameter.

        Args:
            param: one of the layer's parameters.
            loaded_weight: the tensor, of any dtype and device that `Tensor.copy_` takes.
            shard_id: the piece of the parameter that it is; None for all of it.

        Raises:
            CheckpointError: the shape or dtype does not fit, or there is no such shard.
        """
        name = self.name_of(param)
        self.check_weight(name, loaded_weight.shape, shard_id)
        with torch.no_grad():
            self._load(name, loaded_weight, shard_id)

    def check_weight(self, name: str, shape: Sequence[int], shard_id: Any = None) -> None:
        """Whether a checkpoint tensor of this shape can be loaded.

        Raises:
            CheckpointError: it cannot; names the parameter, the shapes and the shard id.
        """
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
        """The name of one of the layer's own parameters.

        Raises:
            CheckpointError: it is none of them.
        """
        for name, own in self._parameters.items():
            if own is param:
                return name
        raise CheckpointError(f"{self.label}: the given parameter is not one of this layer's")

    @property
    def label(self) -> str:
        return f"{self.prefix} ({type(self).__name__})" if self.prefix else type(self).__name__

    def _keep_attributes(self) -> None:
        """Remember what the parameters are marked with, once all of them are made."""
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
