"""Which module classes may carry LoRA, looked up along the class hierarchy.

`lookup(module)` walks the MRO of the instance's class and takes the first registered class, so
subclasses are eligible with their base and the nearest entry wins. Built in: `nn.Linear`,
`nn.Embedding` and, once transformers has been imported by somebody, its `Conv1D`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import nn

from lorafx.errors import ConfigError, nearest

Kind = Literal["linear", "embedding"]
SizeOf = str | Callable[[nn.Module], int]


@dataclass(frozen=True)
class Eligible:
    """One registered class: how to read the sizes and the weight of its instances.

    Attributes:
        cls: the class; its subclasses are eligible too, the nearest entry along the MRO wins.
        kind: "linear" (y = x Wᵀ) or "embedding" (y = W[ids]).
        sizes: instance -> (in_features, out_features).
        weight: attribute that holds the base weight.
        transposed: True where the weight is stored (in, out), as in transformers' Conv1D.
    """

    cls: type[nn.Module]
    kind: Kind
    sizes: Callable[[nn.Module], tuple[int, int]]
    weight: str = "weight"
    transposed: bool = False


@dataclass(frozen=True)
class Sizes:
    """Reads (in_features, out_features) of an instance by attribute name or function."""

    in_features: SizeOf
    out_features: SizeOf

    def __call__(self, module: nn.Module) -> tuple[int, int]:
        return _read(module, self.in_features), _read(module, self.out_features)


def _read(module: nn.Module, size: SizeOf) -> int:
    return getattr(module, size) if isinstance(size, str) else size(module)


_BUILT_IN: dict[type[nn.Module], Eligible] = {
    nn.Linear: Eligible(nn.Linear, "linear", Sizes("in_features", "out_features")),
    nn.Embedding: Eligible(nn.Embedding, "embedding", Sizes("num_embeddings", "embedding_dim")),
}
_REGISTERED: dict[type[nn.Module], Eligible] = {}


def register(
    cls: type[nn.Module],
    *,
    kind: Kind = "linear",
    in_features: SizeOf = "in_features",
    out_features: SizeOf = "out_features",
    weight: str = "weight",
    transposed: bool = False,
) -> Eligible:
    """Make `cls` and its subclasses eligible; a later call for the same class replaces.

    Args:
        cls: the class. Its forward must compute y = x Wᵀ (+ bias) over the last dimension, or
            y = W[ids] for kind "embedding".
        in_features, out_features: attribute name, or a function of the instance, giving K and
            N; for embeddings the vocabulary and the dimension.
        weight: attribute that holds W, which may be absent or packed in quantised classes.
        transposed: True where W is stored (in, out).

    Raises:
        ConfigError: `cls` is no module class, or `kind` is neither of the two.
    """
    if not isinstance(cls, type) or not issubclass(cls, nn.Module):
        raise ConfigError(f"register() takes an nn.Module class, got {cls!r}")
    if kind not in ("linear", "embedding"):
        raise ConfigError(
            f"register({cls.__qualname__}): kind is 'linear' or 'embedding', got {kind!r}"
        )
    entry = Eligible(cls, kind, Sizes(in_features, out_features), weight, transposed)
    _REGISTERED[cls] = entry
    return entry


def unregister(cls: type[nn.Module]) -> None:
    """Undo `register(cls)`; a built-in entry that it replaced is in force again.

    Raises:
        ConfigError: `cls` was not registered.
    """
    if cls not in _REGISTERED:
        known = [c.__qualname__ for c in _REGISTERED]
        name = getattr(cls, "__qualname__", repr(cls))
        raise ConfigError(f"{name} was not registered{nearest(name, known)}")
    del _REGISTERED[cls]


def lookup(module: nn.Module) -> Eligible | None:
    """The entry of the nearest registered class along the MRO, or None."""
    conv1d = _transformers_conv1d()
    for cls in type(module).__mro__:
        entry = _REGISTERED.get(cls) or _BUILT_IN.get(cls)
        if entry is not None:
            return entry
        if conv1d is not None and cls is conv1d:
            return Eligible(conv1d, "linear", Sizes("nx", "nf"), transposed=True)
    return None


def _transformers_conv1d() -> type[nn.Module] | None:
    """transformers' Conv1D, the class object itself. Importing transformers for it would cost
    seconds, and a model that holds one has imported it already."""
    return getattr(sys.modules.get("transformers.pytorch_utils"), "Conv1D", None)
