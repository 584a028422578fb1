"""Keywords of a call that choose an adapter in another library, or are misspelt keywords of lorafx.

A model's `**kwargs` accepts any name, and all rows would be the base's. So such a name is refused
unless some forward of the model declares it.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import nn

from lorafx.errors import ConfigError, nearest

#: Keywords by which lorafx chooses adapters -> what to pass.
KEYWORDS: Mapping[str, str] = {
    "adapter_names": 'adapter_names=["sql", None, ...], one name or None per row',
    "adapter_slots": "adapter_slots=, a tensor of integers that point into adapter_names",
    "adapter_gates": "adapter_gates=(slots, weights), both (B, T, k), or (B, k)",
}
#: Those of calls that take one adapter for each row.
BY_ROW: Mapping[str, str] = {"adapter_names": KEYWORDS["adapter_names"]}
GENERATE = {**BY_ROW, "adapter_gates": "adapter_gates=(slots, weights), both (B, k)"}
#: Names of PEFT, vLLM, SGLang, LoRAX, text-generation-inference, adapters and diffusers, and names
#: that lorafx uses elsewhere -> the keyword of lorafx.
ELSEWHERE: Mapping[str, str] = {
    **dict.fromkeys(
        (
            *("adapter", "adapters", "adapter_name", "adapter_id", "adapter_ids", "adapter_source"),
            *("adapter_list", "adapter_weights", "adapter_weight", "active_adapter", "names"),
            *("active_adapters", "lora", "loras", "lora_name", "lora_names", "lora_request"),
            *("lora_requests", "lora_path", "lora_paths", "lora_id", "lora_ids", "lora_int_id"),
            *("lora_adapter", "lora_adapters", "lora_scale", "lora_weights"),
            *("adapter_parameters", "merged_adapters"),
        ),
        "adapter_names",
    ),
    **dict.fromkeys(("adapter_slot", "adapter_index", "adapter_indices"), "adapter_slots"),
    **dict.fromkeys(("gates", "lora_gates", "routing_weights"), "adapter_gates"),
}
#: Similarity from which a name counts as misspelt.
_MISSPELT = 0.85


@functools.lru_cache(maxsize=1024)
def intended_keyword(name: str) -> str | None:
    """The keyword of lorafx that `name` stands for in another library, or misspells; else None."""
    if name in KEYWORDS or name in ELSEWHERE:
        return ELSEWHERE.get(name)
    near = nearest(name, KEYWORDS, 1, cutoff=_MISSPELT)
    return near.rpartition(" ")[2] or None


def refuse_slips(
    names: Iterable[str],
    function: Callable[..., Any],
    model: nn.Module | None = None,
    ways: Mapping[str, str] = KEYWORDS,
) -> None:
    """Raise ConfigError for keyword `names`, in a call of `function` or parts of `model`, that were
    meant to choose an adapter but would not. `ways`: the keywords of lorafx that the call takes."""
    for name in names:
        keyword = intended_keyword(name)
        if keyword is None and name in KEYWORDS and name not in ways:
            keyword = name
        if keyword is not None and not _declared(name, function, model):
            what = getattr(function, "__qualname__", type(function).__name__)
            raise ConfigError(
                f"{what} has no argument {name!r}, and where its **kwargs takes it, nothing reads "
                f"it: it would choose no adapter. Give "
                f"{ways.get(keyword, next(iter(ways.values())))}"
            )


def takes(function: Callable[..., Any], name: str) -> bool:
    """Whether `function` itself, and not what it wraps, takes a keyword of this name."""
    try:
        parameters = inspect.signature(function, follow_wrapped=False).parameters
    except (TypeError, ValueError):  # written in C
        return False
    return name in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def _declared(name: str, function: Callable[..., Any], model: nn.Module | None) -> bool:
    parts = () if model is None else model.modules()
    forwards = {getattr(part.forward, "__func__", part.forward): None for part in parts}
    for callee in (function, *forwards):
        try:
            parameter = inspect.signature(callee).parameters.get(name)
        except (TypeError, ValueError):  # written in C
            continue
        if parameter is not None and parameter.kind not in (
            parameter.VAR_KEYWORD,
            parameter.VAR_POSITIONAL,
        ):
            return True
    return False
