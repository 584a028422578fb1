"""Bytes that parameters take as they are stored, without reading them."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from lorafx.model.module_graph import storage_key
from lorafx.torch_internals.subclasses import is_traceable_wrapper_subclass


def stored_bytes(tensor: Tensor) -> int:
    """Of a tensor; of one that wraps others (a quantised weight), theirs together."""
    if not is_traceable_wrapper_subclass(tensor):
        return int(tensor.nbytes)
    own: Any = tensor
    names, _ = own.__tensor_flatten__()
    return sum(stored_bytes(getattr(tensor, name)) for name in names)


def module_bytes(module: nn.Module) -> int:
    """Of all parameters of the module and of those below it, each storage once."""
    return sum({storage_key(own): stored_bytes(own) for own in module.parameters()}.values())
