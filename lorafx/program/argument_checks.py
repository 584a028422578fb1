"""Checks of arguments that should hold the requests of a call."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from lorafx.errors import BatchError, LorafxWarning, some


def sizes_of(named: Mapping[str, Any]) -> str:
    """The sizes of a call's tensors, as the end of a message."""
    sizes = [
        f"{name} {tuple(value.shape)}"
        if isinstance(value, Tensor)
        else f"{name}, a {type(value).__name__} and no tensor"
        for name, value in named.items()
        if isinstance(value, (Tensor, list)) or hasattr(value, "__array__")
    ]
    return f"; the call has {some(sizes, _SHOWN)}" if sizes else ""


_SHOWN = 8


def check_requests(
    name: str, shape: Sequence[int], dim: int, rows: int, call: Mapping[str, Any] | None = None
) -> None:
    """Raise BatchError, listing `call`, unless dimension `dim` has `rows` entries or one."""
    if len(shape) <= dim or shape[dim] not in (rows, 1):
        raise BatchError(
            f"argument {name!r} has shape {tuple(shape)}, but its dimension {dim} should hold the "
            f"{rows} requests; declare which dimension does with LoraConfig(row_dims={{{name!r}: "
            "dim}). Give None instead of a dimension when all requests share the argument, or when "
            "no adapter changes what is computed from it alone (any number of images per request)"
            f"{sizes_of(call or {})}"
        )


def warn_ambiguous(name: str, tensor: Tensor, rows: int) -> bool:
    """Warn, and return True, if another dimension has as many entries as the assumed first."""
    sizes = tensor.shape[1:-1] if tensor.is_floating_point() else tensor.shape[1:]
    if rows not in sizes:
        return False
    other = 1 + list(sizes).index(rows)
    warnings.warn(
        f"argument {name!r} has shape {tuple(tensor.shape)}, and it is not declared which "
        f"dimension holds the {rows} requests. Dimension 0 is assumed, but dimension {other} has "
        "as many entries; if that one holds the requests, rows get each other's adapters. Declare "
        f"it with LoraConfig(row_dims={{{name!r}: {other}}}), or confirm dimension 0 with "
        f"row_dims={{{name!r}: 0}}",
        LorafxWarning,
        stacklevel=2,
    )
    return True


def warn_items(name: str, rows: int) -> None:
    """Warn that a list may have an item for each request."""
    warnings.warn(
        f"argument {name!r} has {rows} items, as many as requests, and dimension 0 of each item is "
        "taken for the requests. If each item belongs to one request, declare it with "
        f"LoraConfig(row_dims={{{name!r}: 'items'}}), or confirm dimension 0 with "
        f"row_dims={{{name!r}: 0}}",
        LorafxWarning,
        stacklevel=2,
    )
