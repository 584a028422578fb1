"""loralib's bare parameters, as `lora_state_dict` saves them.

    <module>.lora_A (r, K), .lora_B (N, r)            s = lora_alpha / r;  embeddings (r, V), (D, r)

The factors of a MergedLinear, (G·r, K) and (N, r) of G slices, are refused.
"""

from __future__ import annotations

import re

from torch import nn

from lorafx.adapter_store.dialects.dialect import Translation, raw
from lorafx.adapter_store.peft_config import PeftConfig
from lorafx.adapter_store.peft_keys import factor_sizes
from lorafx.adapter_store.saved import AdapterState, Saved
from lorafx.errors import CheckpointError, UnsupportedAdapterError

KEYS = "<module>.lora_A"
_FACTOR = re.compile(r"(?:(?P<module>.+)\.)?lora_(?P<letter>[AB])")


def claims(saved: Saved) -> bool:
    return any(_FACTOR.fullmatch(key) for key in saved.tensors)


def state(saved: Saved, model: nn.Module | None) -> AdapterState:
    config = _config(saved)
    translation = Translation(saved, "loralib", model)
    for key, tensor in saved.tensors.items():
        match = _FACTOR.fullmatch(key)
        if match is None:
            translation.keep(key)
        else:
            translation.add(match["module"] or "", match["letter"], tensor)
    for path, (_, _, rank) in factor_sizes(translation.tensors).items():
        b = saved.tensors.get(f"{path}.lora_B")
        columns = b.shape[1] if b is not None and b.dim() > 1 else 0
        if rank > columns > 0 and rank % columns == 0:
            raise UnsupportedAdapterError(
                f"{saved.where}: {path} has factors of {rank // columns} slices, as loralib's "
                "MergedLinear saves them; save a lora_B with the slices' own on its diagonal, "
                f"(N, {rank}), and lora_alpha times {rank // columns}"
            )
    return translation.state(config)


def _config(saved: Saved) -> PeftConfig:
    if not isinstance(saved.fields, PeftConfig) and raw(saved.fields).get("lora_alpha") is None:
        raise CheckpointError(
            f"{saved.where} is in loralib's dialect, whose files do not say α; give "
            "AdapterSource(..., config={'lora_alpha': ...})"
        )
    return PeftConfig.read(saved.fields, where=f"the configuration of {saved.where}")
