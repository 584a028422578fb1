"""Weights that a module computes: a parametrisation on each access, a hook before each call.

They are what torch.nn.utils makes (`parametrize`, `prune`, both `weight_norm`s, `spectral_norm`).
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized


def maker_of(module: nn.Module, name: str) -> str:
    """What computes the module's weight `name`, in words; "" if nothing does."""
    if is_parametrized(module, name):
        return "a parametrisation"
    hooked = bool(module._forward_pre_hooks) and isinstance(vars(module).get(name), Tensor)
    return "a hook" if hooked else ""


def has_weight(module: nn.Module, name: str) -> bool:
    """Whether the weight is a tensor of its name, or is computed whenever it is read."""
    return is_parametrized(module, name) or isinstance(getattr(module, name, None), Tensor)
