"""PEFT's own files, with and without its prefix: the form that all readers take."""

from __future__ import annotations

from torch import nn

from lorafx.adapter_store.dialects.dialect import Dialect
from lorafx.adapter_store.peft_config import PeftConfig
from lorafx.adapter_store.peft_keys import parse
from lorafx.adapter_store.saved import AdapterState, Saved
from lorafx.errors import CheckpointError


class Peft(Dialect):
    """base_model.model.<module>.lora_A.weight (r, K), .lora_B.weight (N, r), and a config."""

    name = "peft"
    keys = "<module>.lora_A.weight"

    def claims(self, saved: Saved) -> bool:
        return any(parse(key) is not None for key in saved.tensors)

    def state(self, saved: Saved, model: nn.Module | None) -> AdapterState:
        if saved.fields is None:
            raise CheckpointError(
                f"{saved.where} has no configuration, and without α (lora_alpha) the scale of its "
                "factors is not known; give AdapterSource(..., config={'r': ..., 'lora_alpha': "
                "...}), or the folder with its adapter_config.json"
            )
        config = PeftConfig.read(saved.fields, where=f"the configuration of {saved.where}")
        return AdapterState(config, saved.tensors, saved.where)
