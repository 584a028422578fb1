"""Why a module cannot carry LoRA, worded for the user who named it in `target_modules`."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin

from lorafx.model.convolutions import impossible_convolution, weight_shape
from lorafx.model.experts import unlike_experts
from lorafx.model.quantized import is_stored
from lorafx.model.sites import has_own_forward
from lorafx.model.weight_formats import is_wrapped
from lorafx.registry import Eligible
from lorafx.torch_internals.dynamo import _ConvTransposeNd, _NormBase

#: The way out for a module.
LEAVE = "leave it out of target_modules, or name it in exclude_modules"

# Torch's own classes; the first that the module is an instance of counts.
_UNSUPPORTED: tuple[tuple[tuple[type[nn.Module], ...], str], ...] = (
    ((_ConvTransposeNd,), "transposed convolutions carry no LoRA, here or in PEFT"),
    ((nn.EmbeddingBag,), "embedding bags, which sum rows of their weight, carry no LoRA"),
    ((nn.RNNBase, nn.RNNCellBase), "recurrent layers carry no LoRA"),
    ((nn.Bilinear,), "it multiplies two inputs by a 3-D weight, which carries no LoRA"),
    (
        (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm),
        "it scales its input and multiplies by no matrix, so it carries no LoRA",
    ),
)


def unsupported(module: nn.Module) -> str | None:
    """Why instances of this class of torch's carry no LoRA; None for all other modules."""
    return next((why for classes, why in _UNSUPPORTED if isinstance(module, classes)), None)


def impossible(module: nn.Module, entry: Eligible | None) -> str | None:
    """Why this module, with its registry `entry`, cannot carry LoRA and the way out, or None."""
    if entry is None:
        return _unregistered(module)
    ranks = getattr(module, "tp_size", 1)
    if entry.kind == "experts" and entry.sharding is None and ranks > 1:
        return (
            f"{ranks} ranks share its experts, but its class does not declare which part of "
            "the factors each rank keeps; see lorafx.register(sharding=...)"
        )
    if isinstance(module, LazyModuleMixin) and module.has_uninitialized_params():
        return "its parameters are not initialised yet; run the model once before"
    try:
        sizes = entry.sizes(module)
    except (AttributeError, TypeError, ValueError) as error:
        return f"its sizes cannot be read ({error}); see lorafx.register(in_features=...)"
    if not all(isinstance(s, int) and not isinstance(s, bool) and s > 0 for s in sizes):
        return (
            f"its sizes (in, out) are {sizes}, but must be positive integers; set them, or "
            "see lorafx.register(in_features=...)"
        )
    if entry.kind == "embedding" and getattr(module, "max_norm", None) is not None:
        return (
            "it has max_norm, so its forward rewrites the weight and there is no fixed W "
            f"to add ΔW to; set max_norm = None if that is not intended, or {LEAVE}"
        )
    if entry.kind == "conv" and (why := impossible_convolution(module, entry)):
        return f"{why}; {LEAVE}"
    weight = weight_of(module, entry)
    if weight is None:
        return None
    return _wrong_weight(module, weight, sizes, entry) or _out_of_reach(module, weight, entry)


def weight_of(module: nn.Module, entry: Eligible) -> Tensor | None:
    weight = getattr(module, entry.weight, None)
    return weight if isinstance(weight, Tensor) else None


def _unregistered(module: nn.Module) -> str:
    why = unsupported(module) or unlike_experts(module)
    if why is not None:
        return f"{why}; {LEAVE}"
    if any(parameter is not None for parameter in module._parameters.values()):
        return (
            "its class is not registered, nor is any class that it derives from, so lorafx "
            f"does not know what it computes; see lorafx.register, or {LEAVE}"
        )
    if next(module.children(), None) is not None:
        return f"it has no weight of its own; name modules inside it, or {LEAVE}"
    return f"it has no weight; {LEAVE}"


def _out_of_reach(module: nn.Module, weight: Tensor, entry: Eligible) -> str | None:
    """Why the delta has no place between this rank's product and the ranks' reduction."""
    if entry.sharding is None or entry.handler is not None or not is_stored(module, entry):
        return None
    if entry.sharding.product(module) is module or not has_own_forward(module, entry):
        return None
    return (
        f"its class overrides forward, its weight is stored as {weight.dtype}, and several "
        "ranks share it; see lorafx.register(handler=...)"
    )


def _wrong_weight(
    module: nn.Module, weight: Tensor, sizes: tuple[int, int], entry: Eligible
) -> str | None:
    if weight.layout is not torch.strided:
        return (
            f"its weight is a sparse tensor ({weight.layout}); make it dense (weight.to_dense()), "
            f"or {LEAVE}"
        )
    # Packed and 8-bit formats store W in shapes of their own; the declared sizes stand.
    if not is_wrapped(weight) and is_stored(module, entry):
        return None
    in_features, out_features = sizes
    if entry.kind == "experts":
        return None  # its sizes are its shape's
    as_stored = entry.kind == "embedding" or entry.transposed
    expected: tuple[int, ...] = (out_features, in_features)
    if entry.kind == "conv":
        expected = weight_shape(module)
    elif as_stored:
        expected = (in_features, out_features)
    if tuple(weight.shape) != expected:
        return (
            f"its weight has shape {tuple(weight.shape)}, but its sizes ask for {expected}, "
            "so its class computes something other than the registered one. Register the "
            f"class with its own sizes (lorafx.register), or {LEAVE}"
        )
    return None
