"""Changes of one layer, by each of which it is no longer equal to its neighbours.

A layer has `up`, a linear, `norm`, a layer norm, `act`, a function, and `scale`, a number.
"""

from __future__ import annotations

from typing import Any

from torch.nn import functional as F


def constant(layer: Any) -> None:
    layer.scale = 0.25


def activation(layer: Any) -> None:
    layer.act = F.relu


def eps(layer: Any) -> None:
    layer.norm.eps = 1e-3


def own_forward(layer: Any) -> None:
    layer.norm.forward = lambda h: F.layer_norm(h, h.shape[-1:]) * 2


def hook(layer: Any) -> None:
    layer.norm.register_forward_hook(lambda module, args, output: output + 1)


def tied(layer: Any) -> None:
    layer.norm.bias = layer.norm.weight


def dtype(layer: Any) -> None:
    layer.norm.double()
