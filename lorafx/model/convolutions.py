"""Convolutions as sites: what LoRA computes on them, and where they cannot carry it.

    y += s · B conv(x, A)      A (r, C, kernel...), B (N, r / groups, 1...)

PEFT gives A the base's kernel, stride and padding, but neither its groups nor its dilation nor its
padding mode; B has the base's groups. Banks hold A with its kernels as rows (r, C·∏kernel), and B
as the matrix (r, N) of all channels, zero between groups.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from lorafx.kernels.ops.conv_ops import Window
from lorafx.model.sites import has_own_forward
from lorafx.registry import Eligible

Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d


def convolution_of(module: nn.Module) -> Convolution:
    assert isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d))
    return module


def weight_shape(module: nn.Module) -> tuple[int, ...]:
    conv = convolution_of(module)
    return conv.out_channels, conv.in_channels // conv.groups, *conv.kernel_size


def window_of(module: nn.Module) -> Window:
    """How A moves over x: the base's stride and padding, without its dilation."""
    conv = convolution_of(module)
    pads: list[int] = []
    for dim, length in enumerate(conv.kernel_size):
        if conv.padding == "same":
            pads += [(length - 1) // 2, length - 1 - (length - 1) // 2]
        else:
            size = 0 if isinstance(conv.padding, str) else conv.padding[dim]
            pads += [size, size]
    return Window(tuple(conv.kernel_size), tuple(conv.stride), tuple(pads))


def impossible_convolution(module: nn.Module, entry: Eligible) -> str | None:
    """Why this convolution cannot carry LoRA, or None where it can."""
    conv = convolution_of(module)
    if has_own_forward(module, entry):
        return (
            "its class overrides forward, so PEFT's A and B, which are of the same class, are no "
            "plain convolutions"
        )
    if is_dilated(conv) and conv.padding != "same":
        return (
            f"it has dilation {conv.dilation}, and A, which PEFT does not dilate, has outputs of "
            "another size"
        )
    weight = getattr(module, entry.weight, None)
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        return "its weight is quantised"
    return None


def is_dilated(conv: Convolution) -> bool:
    pairs = zip(conv.dilation, conv.kernel_size, strict=True)
    return any(step != 1 and length != 1 for step, length in pairs)


def unmergeable(module: nn.Module) -> str | None:
    """Why B conv(x, A) is no change of the base's weight, or None where it is."""
    conv = convolution_of(module)
    if conv.groups > 1:
        return f"it has {conv.groups} groups, and A sees the channels of all of them"
    if is_dilated(conv):
        return f"it has dilation {conv.dilation}, and A is not dilated"
    if conv.padding_mode != "zeros" and any(window_of(conv).pads):
        return f"it has padding_mode {conv.padding_mode!r}, and A is padded with zeros"
    return None


def spread_groups(b: Tensor, groups: int) -> Tensor:
    """B (N, r / groups) of a convolution with groups as the matrix (N, r) of all channels."""
    if groups == 1:
        return b
    blocks = b.unflatten(0, (groups, -1))
    return torch.block_diag(*blocks.unbind())


def gathered_groups(b: Tensor, groups: int) -> Tensor:
    """B (N, r / groups) from b (N, r); the inverse of `spread_groups`."""
    if groups == 1:
        return b
    blocks = b.unflatten(0, (groups, -1)).unflatten(2, (groups, -1))
    return torch.cat([blocks[g, :, g] for g in range(groups)])


def matrices(module: nn.Module, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor] | None:
    """A (r, C·∏kernel) and B (N, r) of factors as PEFT saves them; None where sizes do not fit."""
    conv = convolution_of(module)
    dims = len(conv.kernel_size)
    rank = a.shape[0] if a.dim() else 0
    shape_a = (rank, conv.in_channels, *conv.kernel_size)
    shape_b = (conv.out_channels, rank // conv.groups, *[1] * dims)
    if tuple(a.shape) != shape_a or tuple(b.shape) != shape_b or rank % conv.groups:
        return None
    columns = math.prod(shape_a[1:])
    return a.reshape(rank, columns), spread_groups(b.flatten(1), conv.groups)


def norm_factors(module: nn.Module, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """Factors whose product PEFT's DoRA adds to W (N, C / groups · ∏kernel) for its norms: with
    groups, `_DoraConvNdLayer.get_lora_weight` reads B (N, r / groups) as (N / groups, r)."""
    groups = convolution_of(module).groups
    if groups == 1:
        return A, B
    product = gathered_groups(B, groups).reshape(-1, len(A)) @ A
    delta = product.reshape(len(B), -1)
    return delta, torch.eye(len(delta), dtype=delta.dtype, device=delta.device)
