"""Weights that a module computes: a parametrisation on each access, a hook before each call.

They are what torch.nn.utils makes (`parametrize`, `prune`, both `weight_norm`s, `spectral_norm`).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized


def maker_of(module: nn.Module, name: str) -> str:
    """What computes the module's weight `name`, in words; "" if nothing does."""
    if is_parametrized(module, name):
        return "a parametrisation"
    hooked = bool(module._forward_pre_hooks) and isinstance(vars(module).get(name), Tensor)
    return "a hook" if hooked else ""


def raw_tensors(module: nn.Module, name: str) -> list[Tensor]:
    """The tensors that such a weight is computed of."""
    if is_parametrized(module, name):
        made: Any = module.parametrizations
        source = made[name]
        return [*source.parameters(), *source.buffers()]
    named = {**module._parameters, **module._buffers}
    return [item for key, item in named.items() if item is not None and key != "bias"]
