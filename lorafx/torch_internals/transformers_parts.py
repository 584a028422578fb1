"""Parts of transformers without a public name."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import cache
from types import CellType, CodeType
from typing import Any

import torch
from torch import nn

from lorafx.torch_internals.versions import private_names


def causal_model_class(config: Any) -> type:
    """The class that AutoModelForCausalLM has for a configuration. Raises KeyError if none."""
    import transformers

    with private_names():
        mapping: Any = transformers.AutoModelForCausalLM._model_mapping
    model_class: type = mapping[type(config)]
    return model_class


def classes_of(auto: Any, config: Any) -> tuple[type, ...]:
    """The classes that one of transformers' Auto classes has for a configuration."""
    with private_names():
        found: Any = auto._model_mapping.get(type(config), ())
    return found if isinstance(found, tuple) else (found,)


#: What `code_of_generate` knows -> transformers' functions.
_OF_GENERATE = {
    "generate": ("generate",),
    "loops": ("_sample", "_beam_search", "_assisted_decoding"),
    "prompts": ("_prefill",),
}


@cache
def code_of_generate(mixin: Any, part: str) -> frozenset[CodeType]:
    """The code of transformers' `generate`, of its "loops" over tokens, which keep the order of
    their rows, or of what runs the "prompts" at the beginning of one. `mixin` is GenerationMixin; a
    version of it without a function has no such code."""
    functions = [getattr(mixin, name) for name in _OF_GENERATE[part] if hasattr(mixin, name)]
    return frozenset(code for each in functions for code in _codes(each))


def _codes(function: Any) -> Iterator[CodeType]:
    """The code of a function's decorators, and its own."""
    while function is not None:
        yield function.__code__
        function = getattr(function, "__wrapped__", None)


def cell_of_forward(module: nn.Module) -> CellType | None:
    """The variable that holds the forward beneath the function that transformers' tensor or expert
    parallelism has put in its place; None for another forward."""
    return _cell(module, "original_forward")


def sums_experts(module: nn.Module) -> bool:
    """Whether transformers' expert parallelism has each rank compute its experts for the tokens of
    all ranks, which are the same, and sums the results. Otherwise tokens move between ranks."""
    cell = _cell(module, "implementation")
    if cell is None:
        return False
    with private_names():
        from transformers.distributed.expert_parallel import AllReduceEP, AutoEP

        found: Any = cell.cell_contents
        chosen = found.all_reduce if isinstance(found, AutoEP) and not found.megamoe else found
        return isinstance(chosen, AllReduceEP)


def _cell(module: nn.Module, name: str) -> CellType | None:
    """A variable of the function that transformers has put in the place of a module's forward."""
    forward: Any = vars(module).get("forward")
    code = getattr(forward, "__code__", None)
    if code is None or not forward.__module__.startswith("transformers.distributed."):
        return None
    names: tuple[str, ...] = code.co_freevars
    cell: CellType | None = forward.__closure__[names.index(name)] if name in names else None
    return cell


def is_offloaded(module: nn.Module) -> bool:
    """Whether accelerate brings the module's weights from elsewhere around each call."""
    hook, hooks = getattr(module, "_hf_hook", None), sys.modules.get("accelerate.hooks")
    if hook is None or hooks is None:
        return False
    return any(
        isinstance(item, hooks.CpuOffload)
        or (isinstance(item, hooks.AlignDevicesHook) and item.offload)
        for item in getattr(hook, "hooks", (hook,))
    )
