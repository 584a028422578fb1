"""Attributes that a compiled model does not define itself, and names of other libraries.

What is set or deleted under such a name is set or deleted on the model (AsModule).

| name | what happens |
|---|---|
| of PEFT, diffusers, vLLM (`ELSEWHERE`), unless the model has it | AttributeError: the way out |
| a method of the model's own class | is served as a call is: compiled if an adapter is in use |
| of `nn.Module` and transformers' base classes | is passed through: it runs no layer |
| in `REFUSED` | raises: it runs the model without its adapters, or changes it |
| in `GENERATING` | runs in Python; the `generate` that it calls is the compiled model's |
| an argument of another library (`ARGUMENTS`), neither False nor None | ConfigError: the way out |
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from types import MethodType
from typing import Any

from torch import nn

from lorafx.compiled_model.as_module import AsModule
from lorafx.errors import ConfigError, nearest
from lorafx.generation.generate import refuse
from lorafx.libraries import MIXIN, class_of_library
from lorafx.model.keywords import BY_ROW, refuse_slips
from lorafx.runtime.requests import requests_of
from lorafx.runtime.resting import adapters_in_use
from lorafx.torch_internals.compat import untraced

#: Names of PEFT, diffusers and vLLM that a compiled model lacks -> what to use instead.
ELSEWHERE: Mapping[str, str] = {
    "add_lora": "load_adapter(folder, name)",
    "add_weighted_adapter": 'weights by name in calls: adapter_names=[{"sql": 0.7, "chat": 0.3}]',
    "disable_adapter_layers": "disable_adapter(), a block, or set_adapter(None)",
    "enable_adapter_layers": "set_adapter(name)",
    "get_base_model": "_orig_mod, or detach(), which returns it without marks",
    "get_layer_status": "explain(), or why(path) of one module",
    "get_list_adapters": "list_adapters()",
    "get_model_status": "explain(), or get_adapter(name) of one adapter",
    "get_nb_trainable_parameters": "memory(), in bytes; a compiled model trains nothing",
    "hotswap_adapter": "load_adapter(folder, name), which replaces an adapter of that name",
    "list_loras": "list_adapters()",
    "load_lora_adapter": "load_adapter(folder, name)",
    "load_lora_weights": "load_adapter(folder, name)",
    "merge_adapter": "merge(name)",
    "merge_and_unload": "merge(name), or export_merged(name, folder) to save the merged model",
    "peft_config": "get_adapter(name)",
    "print_trainable_parameters": "memory(), in bytes; a compiled model trains nothing",
    "remove_lora": "unload_adapter(name)",
    "set_adapters": "set_adapter(name), or set_adapter({name: weight, ...}) for a sum",
    "unload": "detach()",
    "unmerge_adapter": "unmerge()",
}

_BATCHING = (
    "starts an engine that knows no adapters; use continuous_batching(...), where each request "
    "names one"
)
_INJECTED = "is about adapters that PEFT puts into the model; use"

#: Methods of transformers' base classes that are refused -> why, and what to use instead.
REFUSED: Mapping[str, str] = {
    "init_continuous_batching": _BATCHING,
    "continuous_batching_context_manager": _BATCHING,
    "get_compiled_call": "compiles the model without its adapters; call the compiled model",
    "add_adapter": f"{_INJECTED} load_adapter(folder, name)",
    "disable_adapters": f"{_INJECTED} set_adapter(None), or disable_adapter() for a block",
    "enable_adapters": f"{_INJECTED} set_adapter(name)",
    "get_adapter_state_dict": f"{_INJECTED} the folder that the adapter was loaded from",
    "enable_peft_hotswap": f"{_INJECTED} load_adapter, which swaps adapters without compiling",
}

#: Methods of transformers' base classes that call `generate` and run no layer themselves.
GENERATING = ("heal_tokens",)

#: (module, class) of base classes whose methods do not run the model, except for those above and
#: `generate`.
_BASES = (
    ("transformers.modeling_utils", "PreTrainedModel"),
    MIXIN,
    ("huggingface_hub", "ModelHubMixin"),
)

_HUB = "an AdapterSource says what the files do not (revision=, key_mapping=)"
#: Arguments of PEFT, transformers and torch.compile -> why they are refused, or what to use. False
#: and None are accepted.
ARGUMENTS: Mapping[str, str] = {
    "autocast_adapter_dtype": "banks have the dtype that LoraConfig(dtype=...) says",
    "backend": 'for torch.compile(model, backend="lorafx"), lorafx.attach(model, adapters) first',
    "disable": "the model itself is what runs without a compiler",
    "ephemeral_gpu_offload": "LoraConfig(max_adapters=...) bounds what is on the device",
    "fullgraph": "where the model breaks its graph, the pieces are compiled, as explain() shows",
    "is_trainable": "a compiled model trains nothing: train with PEFT, and load what it saves",
    "key_mapping": _HUB,
    "low_cpu_mem_usage": "files are mapped already",
    "revision": _HUB,
    "torch_device": "adapters are where the model is",
}


def refuse_arguments(function: str, misplaced: Sequence[Any], named: Mapping[str, Any]) -> None:
    """Raise ConfigError for arguments that `function` does not have, unless they are in `ARGUMENTS`
    and False or None."""
    if misplaced:
        raise ConfigError(
            f"{function} takes one configuration, or the adapters, after the model; to give both: "
            f"{function}(model, lora_config, adapters=...)"
        )
    for name, value in named.items():
        if name not in ARGUMENTS:
            near = nearest(name, ("lora_config", "adapters", "adapter_name", "mode", "options"))
            raise ConfigError(f"{function} has no argument {name!r}{near}")
        if value is not None and value is not False:
            raise ConfigError(f"{function} takes no {name}={value!r}: {ARGUMENTS[name]}")


def delegated(compiled: AsModule, name: str) -> Any:
    """The attribute of `compiled` for a name that it does not define itself.

    Raises:
        AttributeError: the model does not have it either.
    """
    if name in ELSEWHERE and not hasattr(compiled._orig_mod, name):
        raise AttributeError(f"a compiled model has no {name!r}; use {ELSEWHERE[name]}")
    if name == "model" and not hasattr(compiled._orig_mod, name):
        return compiled._orig_mod
    value = getattr(compiled._orig_mod, name)
    if not isinstance(value, MethodType) or not isinstance(value.__self__, nn.Module):
        return value
    owner = value.__self__
    for base in _base_classes():
        if isinstance(owner, base) and hasattr(base, name):
            if base is not nn.Module and name in REFUSED:
                return functools.partial(refuse, name, REFUSED[name])
            return _served(compiled, owner, value) if name in GENERATING else value
    inside = any(owner is part for part in compiled._orig_mod.modules())
    return _served(compiled, owner, value) if inside else value


def _base_classes() -> list[type]:
    return [nn.Module, *filter(None, (class_of_library(*home) for home in _BASES))]


def _served(compiled: AsModule, owner: nn.Module, method: MethodType) -> Callable[..., Any]:
    session = compiled._session
    takes_names = "adapter_names" in inspect.signature(method).parameters

    @untraced
    @functools.wraps(method)
    def call(*args: Any, **kwargs: Any) -> Any:
        refuse_slips(kwargs, method, owner, BY_ROW)
        requests = None
        if not takes_names:
            requests = requests_of(kwargs.pop("adapter_names", None))
        with session.fetch_adapters(requests), session.lock:
            session.refuse_injected()
            if requests is None and (session.default is None or session.running.updating):
                return session.run_outside_engine(functools.partial(method, *args, **kwargs))
            compiled._entries.check_attached()

            def find() -> Callable[..., Any]:
                if session.base.merged is not None or not adapters_in_use(session):
                    return method
                served: Callable[..., Any] = method
                if method.__name__ not in GENERATING:
                    served = compiled._entries.of(owner, method=method)
                return compiled._generation.within(served)

            return session.call(find, requests, args, kwargs)

    return call
