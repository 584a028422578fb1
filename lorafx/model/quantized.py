"""Base weights of any format as dense numbers, and dense numbers stored in a weight's format.

    dequantize(module) → W        y = x Wᵀ, W (N, K);  y = W[ids], W (V, D);
                                  y = conv(x, W), W (N, C / groups · ∏kernel), kernels as rows
    requantize(module, W) → e     the module computes with W' of its own format,
                                  e = max |W − W'| / max |W|

`lorafx.register(dequantize=..., requantize=...)` of a class comes first, then the formats of
lorafx.model.weight_formats.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from lorafx.errors import ConfigError
from lorafx.model.convolutions import weight_shape
from lorafx.model.weight_formats import (
    LIBRARIES,
    CannotStore,
    Declared,
    Format,
    Plain,
    WrapperSubclass,
    format_of,
    is_dense,
)
from lorafx.registry import Eligible, lookup


@torch.no_grad()
def dequantize(module: nn.Module, parameter: str | None = None) -> Tensor:
    """The base weight of `module` as dense numbers.

    Args:
        module: a linear or embedding of any class, plain or quantised.
        parameter: which weight, for a module that holds several (`"gate_up_proj"` of routed
            experts). None for the one that its class is registered with, or `weight`.

    Returns:
        W (N, K) of y = x Wᵀ, also where it is stored as (K, N); (V, D) for an embedding. With
        `parameter`, in the layout in which the module stores it. In the dtype that the format
        gives; may be the module's own memory where that holds plain numbers: do not write to it.

    Raises:
        ConfigError: the format is unknown, or what it gives does not have W's sizes.
    """
    return _Weight.of(module, parameter).read()


@torch.no_grad()
def requantize(module: nn.Module, weight: Tensor, parameter: str | None = None) -> float:
    """Store `weight` in the module's format, in place; the inverse of `dequantize`.

    Objects, addresses, sizes and dtypes stay, so compiled graphs see the new weight. `stored`
    makes a copy from which the old weight can be restored exactly.

    Args:
        weight: W, as `dequantize(module, parameter)` gives it, in any floating dtype.

    Returns:
        The largest difference between `weight` and what is stored now, divided by the largest
        magnitude of `weight`.

    Raises:
        ConfigError: the format cannot be written, with the reason; nothing is changed then.
    """
    target = _Weight.of(module, parameter)
    before = target.read()
    if before.shape != weight.shape:
        raise ConfigError(f"{target.label} is {tuple(before.shape)}, got {tuple(weight.shape)}")
    restore = target.format.keep(module, target.name)
    try:
        target.write(weight)
        difference = (target.read().float() - weight.float()).abs().max()
        return float(difference / weight.float().abs().max().clamp_min(1e-30))
    except Exception as error:
        restore()
        if not isinstance(error, CannotStore):
            raise
        raise ConfigError(
            f"{target.label} cannot hold another weight: {error}; see "
            "lorafx.register(requantize=...)"
        ) from error


def stored(module: nn.Module, parameter: str | None = None) -> tuple[int, Callable[[], None]]:
    """Copy all tensors of a module's weight. Returns the bytes of the copies, and a function that
    restores them in place, bit by bit. ConfigError for an unknown format."""
    weight = _Weight.of(module, parameter)
    nbytes = sum(tensor.nbytes for tensor in weight.format.tensors(module, weight.name))
    return nbytes, weight.format.keep(module, weight.name)


@dataclass(frozen=True)
class _Weight:
    """A weight, its format, and the entry of its class, None if the parameter was given by name."""

    module: nn.Module
    name: str
    entry: Eligible | None
    format: Format

    @classmethod
    def of(cls, module: nn.Module, parameter: str | None) -> _Weight:
        entry = lookup(module) if parameter is None else None
        name = parameter or ("weight" if entry is None else entry.weight)
        declared = entry is not None and entry.dequantize is not None
        storage = Declared(entry) if declared and entry else format_of(module, name)
        if storage is None:
            value = getattr(module, name, None)
            kind = f"holds {_described(value)}" if value is not None else "does not exist"
            raise ConfigError(
                f"lorafx cannot read {_label(module, name)}, which {kind}; register its class with "
                "lorafx.register(cls, dequantize=function of the module that gives W (N, K))"
            )
        return cls(module, name, entry, storage)

    @property
    def label(self) -> str:
        return _label(self.module, self.name)

    @property
    def _is_transposed(self) -> bool:
        entry = self.entry
        return entry is not None and entry.transposed and not isinstance(self.format, Declared)

    def read(self) -> Tensor:
        dense: Any = self.format.dequantize(self.module, self.name)
        if not isinstance(dense, Tensor) or not dense.is_floating_point():
            raise ConfigError(f"{self.label} is dequantised to {_described(dense)}, not to W")
        dense = dense.T if self._is_transposed else dense
        if self.entry is not None and self.entry.kind == "conv":
            dense = dense.flatten(1)
        expected = self._shape()
        if expected is not None and tuple(dense.shape) != expected:
            raise ConfigError(
                f"{self.label} is dequantised to {tuple(dense.shape)}, but its class "
                f"declares {expected}; see lorafx.register(dequantize=...)"
            )
        return dense

    def write(self, weight: Tensor) -> None:
        if self.entry is not None and self.entry.requantize is not None:
            self.entry.requantize(self.module, weight)
            return
        if self.entry is not None and self.entry.kind == "conv":
            weight = weight.view(weight_shape(self.module))
        self.format.store(self.module, self.name, weight.T if self._is_transposed else weight)

    def _shape(self) -> tuple[int, int] | None:
        if self.entry is None or self.entry.kind == "experts":
            return None
        if self.entry.kind == "conv":
            out_channels, *kernel = weight_shape(self.module)
            return out_channels, math.prod(kernel)
        in_features, out_features = self.entry.sizes(self.module)
        linear = self.entry.kind == "linear"
        return (out_features, in_features) if linear else (in_features, out_features)


def is_stored(module: nn.Module, entry: Eligible) -> bool:
    """Whether the module stores its weight in a format, or not under the registered name."""
    if is_parametrized(module, entry.weight):
        return False  # not read, since each access computes it
    if entry.dequantize is not None or not Plain().holds(module, entry.weight):
        return True
    return any(item.holds(module, entry.weight) for item in LIBRARIES)


def readable(module: nn.Module, entry: Eligible) -> bool:
    return entry.dequantize is not None or format_of(module, entry.weight) is not None


@dataclass(frozen=True)
class QuantisedModules:
    """Modules of registered classes, with their entries, that compute y = x Wᵀ with a stored W, in
    the `dtype` of the model's first plain parameter."""

    entries: tuple[tuple[nn.Module, Eligible], ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, modules: Iterable[nn.Module]) -> QuantisedModules:
        modules = list(modules)
        parameters = (p for module in modules for p in module.parameters(recurse=False))
        dtype = next((p.dtype for p in parameters if is_dense(p)), torch.get_default_dtype())
        entries = ((module, lookup(module)) for module in modules)
        return cls(
            tuple(
                (module, entry)
                for module, entry in entries
                if entry is not None and entry.kind in ("linear", "embedding")
                if entry.handler is None and not entry.inner
                if is_stored(module, entry)
            ),
            dtype,
        )

    def settle(self) -> None:
        """Make the changes that libraries would make to the weights in a module's first call."""
        for item, module, name in self._of_libraries:
            item.settle(module, name, self.dtype)

    def settle_again(self) -> None:
        """`settle` where something may have undone it; called before each call."""
        for item, module, name in self._to_settle_again:
            item.settle(module, name, self.dtype)

    @property
    def are_wrapped(self) -> bool:
        """Whether all are tensors that wrap others."""
        return len(self.wrapped) == len(self.entries)

    @property
    def wrapped(self) -> list[tuple[nn.Module, str]]:
        """The modules and names of weights that are tensors that wrap others."""
        names = ((module, entry.weight) for module, entry in self.entries)
        return [item for item in names if WrapperSubclass().holds(*item)]

    @cached_property
    def sized_by_data(self) -> list[nn.Module]:
        """Those whose kernels return tensors whose sizes depend on other tensors' contents."""
        return [module for item, module, _ in self._of_libraries if item.sizes_by_data(module)]

    @cached_property
    def _of_libraries(self) -> list[tuple[Format, nn.Module, str]]:
        return [
            (item, module, entry.weight)
            for module, entry in self.entries
            for item in LIBRARIES
            if item.holds(module, entry.weight)
        ]

    @cached_property
    def _to_settle_again(self) -> list[tuple[Format, nn.Module, str]]:
        return [item for item in self._of_libraries if item[0].can_be_unsettled(*item[1:])]


def _label(module: nn.Module, name: str) -> str:
    return f"the weight `{name}` of {type(module).__module__}.{type(module).__qualname__}"


def _described(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{type(value).__qualname__} {tuple(value.shape)} {value.dtype}"
    return type(value).__qualname__
