"""Base weights as numbers, whatever holds them, and numbers put back into what holds them.

    dequantize(module) → W        y = x Wᵀ, W (N, K);  y = W[ids], W (V, D);
                                  y = conv(x, W), W (N, C / groups · ∏kernel), kernels as rows
    requantize(module, W) → e     the module computes with W' of its own format,
                                  e = max |W − W'| / max |W|

What a class says by `lorafx.register(dequantize=..., requantize=...)` comes first, then the formats
of lorafx.model.weight_formats.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from lorafx.errors import ConfigError
from lorafx.model.convolutions import weight_shape
from lorafx.model.weight_formats import (
    LIBRARIES,
    CannotStore,
    Format,
    Plain,
    format_of,
    keeping,
    own_tensors,
)
from lorafx.registry import Eligible, lookup


@torch.no_grad()
def dequantize(module: nn.Module, parameter: str | None = None) -> Tensor:
    """The base weight of `module` as dense numbers.

    Args:
        module: a linear or embedding of any class, plain or quantised; nothing of it changes.
        parameter: which weight, for a module that holds several (`"gate_up_proj"` of routed
            experts). None for the one that its class is registered with, or `weight`.

    Returns:
        W (N, K) of y = x Wᵀ, also where it is stored as (K, N); (V, D) for an embedding. With
        `parameter`, in the layout in which the module stores it. In the dtype that the format
        gives; may be the module's own memory where that holds plain numbers: do not write to it.

    Raises:
        ConfigError: what holds the weight is in no known format, or does not give W's sizes.
    """
    entry = lookup(module)
    name = _name(module, parameter, entry)
    dense = _read(module, name, entry, asked=parameter is not None)
    if not isinstance(dense, Tensor) or not dense.is_floating_point():
        raise ConfigError(f"{_label(module, name)} is dequantised to {_described(dense)}, not to W")
    if parameter is not None:
        return dense
    if entry is not None and entry.transposed and entry.dequantize is None:
        dense = dense.T
    if entry is not None and entry.kind == "conv":
        dense = dense.flatten(1)
    expected = _shape(module, entry)
    if expected is not None and tuple(dense.shape) != expected:
        raise ConfigError(
            f"{_label(module, name)} is dequantised to {tuple(dense.shape)}, but its class "
            f"declares {expected}; see lorafx.register(dequantize=...)"
        )
    return dense


@torch.no_grad()
def requantize(module: nn.Module, weight: Tensor, parameter: str | None = None) -> float:
    """Store `weight` in the format of the module's own, in place; the inverse of `dequantize`.

    Objects, addresses, sizes and dtypes stay as they were, so compiled graphs see the new weight.
    Make a `Stored` first to be able to restore exactly what was there.

    Args:
        weight: W, as `dequantize(module, parameter)` gives it, in any floating dtype.

    Returns:
        The largest difference between `weight` and what is stored now, divided by the largest
        magnitude of `weight`.

    Raises:
        ConfigError: the format cannot be written, with the reason; nothing is changed then.
    """
    entry = lookup(module)
    name = _name(module, parameter, entry)
    before = dequantize(module, parameter)
    if before.shape != weight.shape:
        raise ConfigError(
            f"{_label(module, name)} is {tuple(before.shape)}, got {tuple(weight.shape)}"
        )
    own = None if entry is None or parameter is not None else entry.requantize
    kept = Stored(module, parameter)
    try:
        if own is not None:
            own(module, weight)
        else:
            _write(module, name, entry, weight, asked=parameter is not None)
        after = dequantize(module, parameter)
        difference = (after.float() - weight.float()).abs().max()
        return float(difference / weight.float().abs().max().clamp_min(1e-30))
    except Exception as error:
        kept.restore()
        if not isinstance(error, CannotStore):
            raise
        raise ConfigError(
            f"{_label(module, name)} cannot hold another weight: {error}; see "
            "lorafx.register(requantize=...)"
        ) from error


class Stored:
    """The stored form of a module's weight: copies of all its tensors, which take as much memory
    again.

    Raises:
        ConfigError: the weight is in no known format.
    """

    def __init__(self, module: nn.Module, parameter: str | None = None) -> None:
        entry = lookup(module)
        name = _name(module, parameter, entry)
        if entry is not None and entry.dequantize is not None and parameter is None:
            self._put_back = keeping(lambda: own_tensors(module))
            return
        kept = format_of(module, name)
        if kept is None:
            raise ConfigError(_unreadable(module, name))
        self._put_back = kept.keep(module, name)

    @torch.no_grad()
    def restore(self) -> None:
        """Put the very same numbers back, bit by bit, in place."""
        self._put_back()


def is_stored(module: nn.Module, entry: Eligible) -> bool:
    """Whether the module holds its weight in a format, in place of W's own numbers.

    True too where no attribute of the weight's name holds a tensor: it is packed under others.
    """
    if entry.dequantize is not None or not Plain().holds(module, entry.weight):
        return True
    return any(item.holds(module, entry.weight) for item in LIBRARIES)


@dataclass(frozen=True)
class QuantisedModules:
    """The modules of registered classes that hold their weight in a format, and whose calls compute
    y = x Wᵀ or W[ids], as they were when `of` was called; with their entries."""

    found: tuple[tuple[nn.Module, Eligible], ...]

    @classmethod
    def of(cls, modules: Iterable[nn.Module]) -> QuantisedModules:
        """Those among `modules`."""
        entries = ((module, lookup(module)) for module in modules)
        return cls(
            tuple(
                (module, entry)
                for module, entry in entries
                if entry is not None and entry.kind in ("linear", "embedding")
                if entry.handler is None and not entry.inner
                if is_stored(module, entry)
            )
        )

    def settle(self) -> None:
        """Have libraries do now what they would otherwise do in a module's first call."""
        for item, module, name in self._of_libraries:
            item.settle(module, name)

    def settle_again(self) -> None:
        """`settle` again where something may have undone it; called before each call."""
        for item, module, name in self._restless:
            item.settle(module, name)

    @cached_property
    def sizes_by_data(self) -> bool:
        """Whether some kernel returns tensors whose sizes depend on what is in others."""
        return any(item.sizes_by_data(module) for item, module, _ in self._of_libraries)

    @cached_property
    def _of_libraries(self) -> list[tuple[Format, nn.Module, str]]:
        return [
            (item, module, entry.weight)
            for module, entry in self.found
            for item in LIBRARIES
            if item.holds(module, entry.weight)
        ]

    @cached_property
    def _restless(self) -> list[tuple[Format, nn.Module, str]]:
        return [found for found in self._of_libraries if found[0].is_restless(*found[1:])]


def readable(module: nn.Module, entry: Eligible) -> bool:
    """Whether `dequantize` knows how to read the module's weight, without doing it."""
    return entry.dequantize is not None or format_of(module, entry.weight) is not None


def _name(module: nn.Module, parameter: str | None, entry: Eligible | None) -> str:
    if parameter is not None:
        return parameter
    return "weight" if entry is None else entry.weight


def _read(module: nn.Module, name: str, entry: Eligible | None, *, asked: bool) -> Any:
    if entry is not None and entry.dequantize is not None and not asked:
        return entry.dequantize(module)
    kept = format_of(module, name)
    if kept is None:
        raise ConfigError(_unreadable(module, name))
    return kept.dequantize(module, name)


def _write(
    module: nn.Module, name: str, entry: Eligible | None, weight: Tensor, *, asked: bool
) -> None:
    if entry is not None and entry.dequantize is not None and not asked:
        raise CannotStore("its class declares how to read its weight, but not how to write it")
    kept = format_of(module, name)
    assert kept is not None  # it was read
    turned = not asked and entry is not None and entry.transposed
    if entry is not None and entry.kind == "conv":
        weight = weight.view(weight_shape(module))
    kept.store(module, name, weight.T if turned else weight)


def _shape(module: nn.Module, entry: Eligible | None) -> tuple[int, int] | None:
    """The sizes that W must have, where its class says them."""
    if entry is None or entry.kind == "experts":
        return None
    if entry.kind == "conv":
        out_channels, *kernel = weight_shape(module)
        return out_channels, math.prod(kernel)
    in_features, out_features = entry.sizes(module)
    linear = entry.kind == "linear"
    return (out_features, in_features) if linear else (in_features, out_features)


def _unreadable(module: nn.Module, name: str) -> str:
    held = getattr(module, name, None)
    kind = f"holds {_described(held)}" if held is not None else "does not exist"
    return (
        f"lorafx cannot read {_label(module, name)}, which {kind}; register its class with "
        "lorafx.register(cls, dequantize=function of the module that gives W (N, K))"
    )


def _label(module: nn.Module, name: str) -> str:
    return f"the weight `{name}` of {type(module).__module__}.{type(module).__qualname__}"


def _described(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{type(value).__qualname__} {tuple(value.shape)} {value.dtype}"
    return type(value).__qualname__
