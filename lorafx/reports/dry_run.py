"""Which sites are given the very same input, found by a forward on the meta device.

Operators there compute shapes and no numbers. What runs is a copy of the modules over stand-ins for
all tensors, without memory: code that keeps something of a call keeps it on the copy.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lorafx.model.sites import Site
from lorafx.torch_internals.trees import tree_map_only


class DryRunError(Exception):
    """The forward cannot be run without numbers; the message says why."""


def same_inputs(
    model: nn.Module, sites: Sequence[Site], inputs: Mapping[str, Any]
) -> dict[str, int]:
    """A number for the input of each site that the forward calls, by path: equal numbers are one
    tensor. A site that is called several times has that of its first call.

    Args:
        inputs: arguments of a call, by name.

    Raises:
        DryRunError: code of the model asks for numbers, or fails otherwise.
    """
    _refuse_hooks(model)
    numbers, found = itertools.count(), dict[str, int]()
    seen: dict[int, tuple[Tensor, int]] = {}  # holds the tensors, so that no id comes twice

    def see(path: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
        if x is not None:
            _, number = seen.setdefault(id(x), (x, next(numbers)))
            found.setdefault(path, number)

    try:
        empty, memo = _without_numbers(model)
        for site in sites:
            module = memo[id(site.module)]
            module.register_forward_pre_hook(
                lambda _, args, kwargs, path=site.path: see(path, args, kwargs), with_kwargs=True
            )
        with torch.no_grad():
            empty(**tree_map_only(Tensor, _stand_in, dict(inputs)))
    except Exception as error:  # of code of the model, which may be anything
        first = (str(error).splitlines() or [""])[0]
        raise DryRunError(f"{type(error).__name__}: {first:.200}") from error
    return found


def _refuse_hooks(model: nn.Module) -> None:
    """Hooks of others may do anything: accelerate's load weights from a disk."""
    for path, module in model.named_modules():
        hooked = module._forward_pre_hooks or module._forward_hooks or "forward" in vars(module)
        if hooked:
            raise DryRunError(
                f"{path or 'the model'} has hooks, or a forward of its own, which would run"
            )


def _without_numbers(model: nn.Module) -> tuple[nn.Module, dict[int, Any]]:
    """A copy of the model over stand-ins, and what each object of the model is in it, by `id`."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        held = (*module._parameters.values(), *module._buffers.values(), *vars(module).values())
        memo.update({id(own): _stand_in(own) for own in held if isinstance(own, Tensor)})
    return copy.deepcopy(model, memo), memo


def _stand_in(tensor: Tensor) -> Tensor:
    """A tensor like this one without memory. What subclasses do when they are moved is theirs, so
    nothing is asked of them."""
    made = torch.empty_strided(
        tuple(tensor.shape), tuple(tensor.stride()), dtype=tensor.dtype, device="meta"
    )
    return nn.Parameter(made, requires_grad=False) if isinstance(tensor, nn.Parameter) else made
