"""Keywords of a call that choose an adapter in another library, or are a slip for ours.

A model's `**kwargs` swallows any name, and all rows would be the base's. So such a name is refused
where no forward of the model declares it.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import nn

from lorafx.errors import ConfigError, nearest

#: Keywords by which lorafx chooses adapters -> how they are given.
OURS: Mapping[str, str] = {
    "adapter_names": 'adapter_names=["sql", None, ...], one name or None per row',
    "adapter_slots": "adapter_slots=, a tensor of integers that point into adapter_names",
}
#: Where there is one adapter for each row.
BY_ROW: Mapping[str, str] = {"adapter_names": OURS["adapter_names"]}
#: Names of PEFT, vLLM, SGLang, LoRAX, text-generation-inference, adapters and diffusers, and those
#: that lorafx has in other places -> the name of ours.
ELSEWHERE: Mapping[str, str] = {
    **dict.fromkeys(
        (
            *("adapter", "adapters", "adapter_name", "adapter_id", "adapter_ids", "adapter_source"),
            *("adapter_list", "adapter_weights", "adapter_weight", "active_adapter", "names"),
            *("active_adapters", "lora", "loras", "lora_name", "lora_names", "lora_request"),
            *("lora_requests", "lora_path", "lora_paths", "lora_id", "lora_ids", "lora_int_id"),
            *("lora_adapter", "lora_adapters", "lora_scale", "lora_weights"),
        ),
        "adapter_names",
    ),
    **dict.fromkeys(("adapter_slot", "adapter_index", "adapter_indices"), "adapter_slots"),
}
#: Similarity from which a name is a slip.
_MISSPELT = 0.85


@functools.lru_cache(maxsize=1024)
def meant(name: str) -> str | None:
    """The keyword of ours that `name` stands for in another library, or is a slip of; else None."""
    if name in OURS or name in ELSEWHERE:
        return ELSEWHERE.get(name)
    near = nearest(name, OURS, 1, cutoff=_MISSPELT)
    return near.rpartition(" ")[2] or None


def refuse_slips(
    given: Iterable[str],
    function: Callable[..., Any],
    model: nn.Module | None = None,
    ways: Mapping[str, str] = OURS,
) -> None:
    """Raise ConfigError, before anything has run, for a slip among the keywords of a call of
    `function`, which may pass them to parts of `model`. `ways`: ours that this call takes."""
    for name in given:
        ours = meant(name)
        if ours is None and name in OURS and name not in ways:
            ours = name
        if ours is not None and not _declared(name, function, model):
            what = getattr(function, "__qualname__", type(function).__name__)
            raise ConfigError(
                f"{what} has no argument {name!r}, and where its **kwargs takes it, nothing reads "
                f"it: it would choose no adapter. Give {ways.get(ours, next(iter(ways.values())))}"
            )


def _declared(name: str, function: Callable[..., Any], model: nn.Module | None) -> bool:
    parts = () if model is None else model.modules()
    forwards = {getattr(part.forward, "__func__", part.forward): None for part in parts}
    for taker in (function, *forwards):
        try:
            parameter = inspect.signature(taker).parameters.get(name)
        except (TypeError, ValueError):  # written in C
            continue
        if parameter is not None and parameter.kind not in (
            parameter.VAR_KEYWORD,
            parameter.VAR_POSITIONAL,
        ):
            return True
    return False
