"""How a layer stores its weight and computes with it: the `quant_method` of a layer.

    unquantised    y = x Wᵀ + b                     weight (N, K)
    int8 channel   y = (x Qᵀ) · s + b, W ≈ s · Q    weight Q (N, K) int8, weight_scale s (N,) f32

N and K are this rank's sizes. A method is stateless, so layers may share it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorafx.errors import CheckpointError
from lorafx.weights.loadable_layer import WeightMethod


class QuantizeMethodBase(WeightMethod, ABC):
    """Base class of weight formats. `layer` is a layer of this package, or any module that has what
    `create_weights` registers."""

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
    """Dense weights in `params_dtype`."""

    def create_weights(self, layer: Any, device: torch.device | str | None = None) -> None:
        shape = layer.output_size_per_partition, layer.input_size_per_partition
        weight = torch.empty(shape, dtype=layer.params_dtype, device=device)
        # Uninitialised memory may hold NaN, which a model that is not loaded yet would spread.
        bound = layer.input_size**-0.5
        nn.init.uniform_(weight, -bound, bound)
        layer.add_weight("weight", weight, output_dim=0, input_dim=1)

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return F.linear(x, layer.weight, bias)

    def dequantize(self, layer: Any) -> Tensor:
        return layer.weight.detach()


class Int8ChannelLinearMethod(QuantizeMethodBase):
    """Weight-only int8, one scale per output row, symmetric. Whole rows of dense checkpoints are
    quantised before they are cut, so that scales do not depend on ranks."""

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
