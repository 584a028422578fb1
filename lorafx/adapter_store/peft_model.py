"""Takes over the adapters of PEFT in memory: of a `peft.PeftModel`, or injected.

PEFT replaces target modules by wrappers that hold them as `base_layer`, below a `peft.PeftModel` or
in the model itself; modules trained as a whole, and embeddings with trained tokens, are the
`original_module` of their wrappers. The adapters' weights are read, then each wrapper is replaced
by its module, until `restore()`. Meanwhile the methods of PEFT's classes raise: without wrappers
they would silently compute or save the base. PEFT is optional.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from types import FunctionType
from typing import Any, NamedTuple, NoReturn, cast

import torch
from torch import Tensor, nn

from lorafx.adapter_store.peft_config import PeftConfig
from lorafx.adapter_store.saved import AdapterState
from lorafx.errors import CaptureError, CheckpointError, UnsupportedAdapterError
from lorafx.model.module_graph import join

#: Attributes that PEFT and transformers leave on a model with adapters.
_ATTRIBUTES = ("peft_config", "_hf_peft_config_loaded")
#: Methods of `nn.Module` that would answer without the adapters.
_OF_MODULES = ("forward", "state_dict", "load_state_dict")
#: Methods of PEFT's classes that stay right, or that end a `disable_adapter` block in which the
#: model was taken over.
_HARMLESS = ("get_base_model", "enable_adapter_layers")


def is_peft_model(model: object) -> bool:
    """Whether `model` is a `peft.PeftModel`."""
    peft = sys.modules.get("peft")
    return peft is not None and isinstance(model, peft.PeftModel)


def peft_layers(model: nn.Module) -> list[tuple[str, Any]]:
    """PEFT's wrappers of modules with LoRA, each with the path of its module."""
    if "peft" not in sys.modules:
        return []
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [(path, m) for path, m in model.named_modules() if isinstance(m, BaseTunerLayer)]
    auxiliary = {id(m) for wrapper in _auxiliary_wrappers(model) for m in wrapper.modules()}
    return [(path, m) for path, m in layers if id(m) not in auxiliary]


def _auxiliary_wrappers(model: nn.Module) -> list[Any]:
    from peft.utils.other import AuxiliaryTrainingWrapper

    return [m for m in model.modules() if isinstance(m, AuxiliaryTrainingWrapper)]


def has_peft_attributes(model: nn.Module) -> bool:
    """Whether PEFT has put adapters on the model; checked in every call."""
    return _ATTRIBUTES[0] in vars(model)


class Held(NamedTuple):
    """The adapters of a model (tensors are not copied), PEFT's wrappers by path, and for each of
    them the names of those that are merged, in the list that PEFT keeps."""

    base: nn.Module
    adapters: dict[str, AdapterState]
    layers: list[tuple[str, Any]]
    merged: list[list[str]]


@dataclass
class TakenOver:
    """A model without wrappers, its `adapters` (tensors are not copied), and its `active` ones."""

    base: nn.Module
    adapters: dict[str, AdapterState]
    active: tuple[str, ...]
    _wrappers: list[tuple[nn.Module, str, nn.Module]] = field(default_factory=list)
    _attributes: dict[str, Any] = field(default_factory=dict)
    _hidden: list[tuple[nn.Module, str]] = field(default_factory=list)

    def restore(self) -> None:
        for parent, name, wrapper in reversed(self._wrappers):
            parent._modules[name] = wrapper
        self._wrappers.clear()
        vars(self.base).update(self._attributes)
        self._attributes.clear()
        for part, name in self._hidden:
            del vars(part)[name]
        self._hidden.clear()


def take_over(model: nn.Module) -> TakenOver:
    """Read the adapters of a PeftModel or an injected model, then unwrap it. Raises as
    `adapters_in`, with the model unchanged."""
    base, adapters, layers, _ = adapters_in(model)
    # Each layer applies those active adapters that it has.
    active = (n for _, layer in layers for n in layer.active_adapters if n in layer.scaling)
    disabled = any(layer.disable_adapters for _, layer in layers)
    taken_over = TakenOver(base, adapters, () if disabled else tuple(dict.fromkeys(active)))
    _unwrap(taken_over)
    if is_peft_model(model):
        taken_over._hidden = _hide_methods(model)
    return taken_over


def adapters_in(model: nn.Module) -> Held:
    """The adapters of a PeftModel or an injected model, which is left as it is.

    Raises UnsupportedAdapterError; CheckpointError for merged adapters, adapters of a part of the
    model, or none.
    """
    whole = is_peft_model(model)
    label = "the PeftModel" if whole else f"the {type(model).__name__}"
    base = cast(Any, model).get_base_model() if whole else model
    layers = peft_layers(base)
    if not whole and not layers:
        raise CheckpointError(f"{type(model).__name__} is not a peft.PeftModel and holds no LoRA")
    configs = _configs(model, layers, label)
    _refuse_other_layers(layers)
    tokens = [getattr(wrapper, "token_adapter", None) for wrapper in _auxiliary_wrappers(base)]
    holders = [*(layer for _, layer in layers), *(layer for layer in tokens if layer is not None)]
    merged = [layer.merged_adapters for layer in holders]
    refuse_merged(merged, model)
    adapters = {
        name: AdapterState(
            config,
            _tensors_of(model, name),
            f"{label}'s adapter {name!r}",
            {path: layer.scaling[name] for path, layer in layers if name in layer.scaling},
        )
        for name, config in configs.items()
    }
    return Held(base, adapters, layers, merged)


def refuse_merged(merged: list[list[str]], model: nn.Module) -> None:
    """Raise CheckpointError if adapters are `merged` (`Held`) into the base weights of `model`."""
    if any(merged):
        names = ", ".join(sorted({name for layer in merged for name in layer}))
        call = "unmerge() of each PEFT layer"
        if is_peft_model(model):
            call = "peft_model.unmerge_adapter()"
        raise CheckpointError(
            f"adapters {names} are merged into the base weights; call {call} first"
        )


def _tensors_of(model: nn.Module, name: str) -> dict[str, Tensor]:
    """An adapter's tensors. PEFT expects trained tokens of each one: placeholders stand in."""
    from peft.utils.other import TrainableTokensWrapper

    placeholder = torch.empty(0)
    tensors: dict[str, Tensor] = {
        f"{path}.token_adapter.trainable_tokens_delta.{name}": placeholder
        for path, module in model.named_modules()
        if isinstance(module, TrainableTokensWrapper)
    }
    # Not state_dict(): bitsandbytes modules change their weights in it.
    tensors.update(model.named_parameters(remove_duplicate=False))
    tensors.update(model.named_buffers(remove_duplicate=False))
    saved = sys.modules["peft"].get_peft_model_state_dict(
        model, tensors, adapter_name=name, save_embedding_layers=False
    )
    return {key: tensor.detach() for key, tensor in saved.items() if tensor is not placeholder}


def _configs(model: Any, layers: list[tuple[str, Any]], label: str) -> dict[str, PeftConfig]:
    configs = getattr(model, "peft_config", None)
    if not isinstance(configs, dict):
        raise CheckpointError(
            f"{layers[0][0]} is wrapped by PEFT's {type(layers[0][1]).__name__}, but the "
            f"{type(model).__name__} has no peft_config, so the adapters belong to a part of "
            "it; compile that part, or load the adapters from their folders onto the plain "
            "model"
        )
    return {
        name: PeftConfig.read(config, where=f"{label}'s adapter {name!r}")
        for name, config in configs.items()
    }


def _refuse_other_layers(layers: list[tuple[str, Any]]) -> None:
    from peft.tuners.lora import LoraLayer
    from peft.tuners.lora.layer import ParamWrapper
    from peft.tuners.tuners_utils import BaseTunerLayer

    for path, layer in layers:
        inner = getattr(layer, "base_layer", None)
        # Two parameters of a module have nested wrappers.
        nested = isinstance(layer, ParamWrapper) and isinstance(inner, ParamWrapper)
        single = inner is not None and not isinstance(inner, BaseTunerLayer)
        if not isinstance(layer, LoraLayer) or not (nested or single):
            raise UnsupportedAdapterError(
                f"{path} is wrapped by {type(layer).__name__}, which lorafx cannot unwrap; load "
                "the adapters from their folders onto the plain model"
            )


def _unwrap(taken: TakenOver) -> None:
    attributes = vars(taken.base)
    taken._attributes = {name: attributes.pop(name) for name in _ATTRIBUTES if name in attributes}
    for _, parent in list(bare_modules(taken.base)):
        for name, child in list(parent._modules.items()):
            inner = _bare(child)
            if inner is not child:
                parent._modules[name] = inner
                taken._wrappers.append((parent, name, cast(nn.Module, child)))


def bare_modules(base: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules of the model without PEFT's wrappers, by path, each once."""
    seen, pending = set[int](), [("", base)]
    while pending:
        path, module = pending.pop()
        if id(module) not in seen:
            seen.add(id(module))
            yield path, module
            children = ((name, _bare(child)) for name, child in module._modules.items())
            pending += [(join(path, n), child) for n, child in children if child is not None]


def _bare(module: nn.Module | None) -> nn.Module | None:
    """The module inside of PEFT's wrappers; any other module itself."""
    from peft.tuners.lora import LoraLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    inner: Any = module
    while True:
        if isinstance(inner, AuxiliaryTrainingWrapper):
            inner = cast(Any, inner).original_module
        elif isinstance(inner, LoraLayer):
            inner = cast(Any, inner).base_layer
        else:
            return cast("nn.Module | None", inner)


def without_wrappers(model: nn.Module) -> nn.Module:
    """The base model of a PeftModel that was taken over; any other model itself."""
    forward = vars(model).get("forward") if isinstance(model, nn.Module) else None
    if not isinstance(forward, partial) or forward.func is not _raise_taken_over:
        return model
    return cast(nn.Module, cast(Any, model).get_base_model())


def _hide_methods(peft_model: nn.Module) -> list[tuple[nn.Module, str]]:
    hidden: list[tuple[nn.Module, str]] = []
    owner = type(peft_model).__name__
    for part in (peft_model, cast(nn.Module, peft_model.base_model)):
        bases = [base for base in type(part).__mro__ if base not in nn.Module.__mro__]
        attributes = {name: value for base in bases for name, value in vars(base).items()}
        methods = [
            name
            for name, value in attributes.items()
            if isinstance(value, FunctionType) and not (name[0] == "_" or hasattr(nn.Module, name))
        ]
        for name in dict.fromkeys([*_OF_MODULES, *methods]):
            if name not in vars(part) and name not in _HARMLESS:
                vars(part)[name] = partial(_raise_taken_over, owner, name)
                hidden.append((part, name))
    return hidden


def _raise_taken_over(owner: str, name: str, *_: Any, **__: Any) -> NoReturn:
    raise CaptureError(
        f"{owner}.{name}: lorafx took over the adapters of this {owner}, so it has none "
        "now. Use the model that lorafx.compile (or attach) returned, or detach() that "
        "model first, which gives the adapters back"
    )
