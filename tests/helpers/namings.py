"""The names that trainers give a model's weights: functions from a state dict to another one.

plain       as `state_dict()` has them
wrapped     of a model that PEFT, torch.compile or DistributedDataParallel wraps
experts     a tensor an expert, a half, or all, under each of their names
older       as transformers saves them: the names that checkpoints on the Hub have
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import revert_weight_conversion

State = dict[str, Tensor]
_LINEAR = re.compile(r"_proj\.(weight|bias)$")


def new_weights(base: nn.Module, seed: int) -> nn.Module:
    """A model like `base` with other random weights of the same scale, tied ones still tied."""
    twin = copy.deepcopy(base)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in twin.parameters():
            noise = torch.randn(parameter.shape, generator=generator) * parameter.std()
            parameter.copy_(noise if parameter.dim() > 1 else parameter + 0.1 * noise)
    return twin


def _renamed(state: State, rename: Callable[[str], str]) -> State:
    return {rename(name): tensor for name, tensor in state.items()}


def plain(model: nn.Module) -> State:
    return dict(model.state_dict())


def of_peft(model: nn.Module) -> State:
    """`base_model.model.…q_proj.base_layer.weight`, the experts' parameters inside two wrappers."""

    def rename(name: str) -> str:
        name = re.sub(
            r"experts\.(gate_up|down)_proj$", r"experts.base_layer.base_layer.\1_proj", name
        )
        return "base_model.model." + _LINEAR.sub(r"_proj.base_layer.\1", name)

    return _renamed(plain(model), rename)


def of_compiled(model: nn.Module) -> State:
    """A compiled model, of which the layers were compiled too."""
    return _renamed(
        plain(model),
        lambda name: "_orig_mod." + re.sub(r"layers\.(\d+)", r"layers.\1._orig_mod", name),
    )


def older(model: nn.Module) -> State:
    return dict(revert_weight_conversion(model, plain(model)))


def _experts(model: nn.Module, split: Callable[[str, str, Tensor], State]) -> State:
    """The state with the experts' parameters, (E, out, in), as `split(module, name, tensor)`."""
    found: State = {}
    for name, tensor in plain(model).items():
        module, _, last = name.rpartition(".")
        stacked = tensor.dim() == 3 and last in ("gate_up_proj", "down_proj")
        found.update(split(module, last, tensor) if stacked else {name: tensor})
    return found


def per_expert(model: nn.Module) -> State:
    def split(module: str, name: str, tensor: Tensor) -> State:
        if name == "down_proj":
            return {f"{module}.{e}.down_proj.weight": w for e, w in enumerate(tensor)}
        return {
            f"{module}.{e}.{half}.weight": w
            for e, both in enumerate(tensor)
            for half, w in zip(("gate_proj", "up_proj"), both.chunk(2), strict=True)
        }

    return _experts(model, split)


def mixtral_words(model: nn.Module) -> State:
    words = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
    return _renamed(
        per_expert(model),
        lambda name: re.sub(
            r"(experts\.\d+)\.(\w+)\.weight$", lambda m: f"{m[1]}.{words[m[2]]}.weight", name
        ),
    )


def fused(model: nn.Module) -> State:
    words = {"gate_up_proj": "w13_weight", "down_proj": "w2_weight"}
    return _experts(model, lambda module, name, w: {f"{module}.{words[name]}": w})


DENSE: dict[str, Callable[[Any], State]] = {
    "plain": plain,
    "peft": of_peft,
    "compiled": of_compiled,
    "older": older,
}
EXPERTS: dict[str, Callable[[Any], State]] = {
    "per expert": per_expert,
    "w1 w2 w3": mixtral_words,
    "w13 w2": fused,
}
