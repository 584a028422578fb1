"""Packed base weights: the siblings of one group as views of one buffer.

    W = [W_0; W_1; ...]  (ΣN, K),   W_i.data = W[offset_i : offset_i + N_i]

The original parameters stay where and what they were (same objects, names, shapes and values), so
`state_dict()` and `save_pretrained()` give what they gave before; memory does not grow. What
splits the views again (`model.to(...)`, `load_state_dict(assign=True)`) is noticed before a call.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from lorafx.compat import mark_fixed_shape
from lorafx.module_graph import ModuleGraph
from lorafx.sites import Group


@dataclass(eq=False)
class PackedGroup:
    """One group whose base weights are views of `weight` (ΣN, K), biases of `bias` (ΣN,).

    Where only some siblings have a bias, the others' part of `bias` is zero.
    """

    group: Group
    weight: Tensor
    bias: Tensor | None

    def __post_init__(self) -> None:
        # Looked at before every call, so addresses are computed once; the buffers never move.
        self._views = [
            (site.module._parameters, name, _address(buffer, offset))
            for site, offset in zip(self.group.sites, self.group.offsets, strict=True)
            for name, buffer in ((site.eligible.weight, self.weight), ("bias", self.bias))
            if buffer is not None and site.module._parameters.get(name) is not None
        ]

    @property
    def intact(self) -> bool:
        """True while every sibling's parameter still is its view of the packed buffer."""
        for parameters, name, address in self._views:
            parameter = parameters[name]
            if parameter is None or parameter.data_ptr() != address:
                return False
        return True


def pack_weights(graph: ModuleGraph, group: Group) -> PackedGroup | None:
    """Make the group's base weights views of one buffer, or return None where they cannot be.

    Packable: at least two siblings, each with a plain dense contiguous 2-D (out, in) parameter of
    its own storage, all of one dtype, device and `requires_grad`.
    """
    sites = group.sites
    if len(sites) < 2 or any(s.eligible.kind != "linear" or s.eligible.transposed for s in sites):
        return None
    weights = [site.module._parameters.get(site.eligible.weight) for site in sites]
    shapes = [(site.out_features, site.in_features) for site in sites]
    if not all(
        _packable(graph, weight, shape) for weight, shape in zip(weights, shapes, strict=True)
    ):
        return None
    if len({(w.dtype, w.device, w.requires_grad) for w in weights if w is not None}) != 1:
        return None
    biases = [site.module._parameters.get("bias") for site in sites]
    if any(
        getattr(site.module, "bias", None) is not own
        for site, own in zip(sites, biases, strict=True)
    ):
        return None
    first = weights[0]
    assert first is not None
    for site, bias in zip(sites, biases, strict=True):
        if bias is not None and (
            not _packable(graph, bias, (site.out_features,)) or bias.dtype != first.dtype
        ):
            return None
    with torch.no_grad():
        packed = torch.cat([weight.detach() for weight in weights if weight is not None])
        packed_bias = None
        if any(bias is not None for bias in biases):
            packed_bias = packed.new_zeros(packed.shape[0])
        _adopt(weights, packed, group.offsets, shapes)
        if packed_bias is not None:
            for bias, offset in zip(biases, group.offsets, strict=True):
                if bias is not None:
                    packed_bias[offset : offset + bias.shape[0]] = bias
            _adopt(biases, packed_bias, group.offsets, [(site.out_features,) for site in sites])
    for tensor in (packed, packed_bias):
        if tensor is not None:
            mark_fixed_shape(tensor)
    return PackedGroup(group, packed, packed_bias)


def repack(packed: PackedGroup) -> bool:
    """Point the parameters at the packed buffer again, with the values that they have now.

    False where dtype or device have changed, so that the buffer cannot hold them.
    """
    sites, offsets = packed.group.sites, packed.group.offsets
    for name, buffer in (("weight", packed.weight), ("bias", packed.bias)):
        if buffer is None:
            continue
        own = [
            site.module._parameters.get(site.eligible.weight if name == "weight" else "bias")
            for site in sites
        ]
        for parameter in own:
            if parameter is not None and (parameter.dtype, parameter.device) != (
                buffer.dtype,
                buffer.device,
            ):
                return False
        with torch.no_grad():
            for parameter, offset in zip(own, offsets, strict=True):
                if parameter is not None:
                    buffer[offset : offset + parameter.shape[0]] = parameter
        _adopt(own, buffer, offsets, [tuple(p.shape) if p is not None else () for p in own])
    return True


def _packable(graph: ModuleGraph, parameter: nn.Parameter | None, shape: tuple[int, ...]) -> bool:
    return (
        parameter is not None
        and not is_traceable_wrapper_subclass(parameter)
        and tuple(parameter.shape) == shape
        and parameter.is_contiguous()
        and parameter.is_floating_point()
        and parameter.device.type != "meta"
        and parameter.untyped_storage().nbytes() == parameter.numel() * parameter.element_size()
        and len(graph.sharing(parameter)) == 1
    )


def _adopt(
    parameters: list[nn.Parameter | None],
    buffer: Tensor,
    offsets: tuple[int, ...],
    shapes: Sequence[tuple[int, ...]],
) -> None:
    for parameter, offset, shape in zip(parameters, offsets, shapes, strict=True):
        if parameter is not None:
            parameter.data = buffer[offset : offset + shape[0]]


def _address(buffer: Tensor, row: int) -> int:
    return buffer.data_ptr() + row * buffer.stride(0) * buffer.element_size()
