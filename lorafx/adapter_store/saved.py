"""An adapter as it was saved, and the one form that all readers of meaning take.

    source ─▶ Saved, in a dialect ─▶ AdapterState, in PEFT's names

Sources: lorafx.adapter_store.opening. Dialects: lorafx.adapter_store.dialects.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, field, is_dataclass
from typing import Any, TypeAlias

from torch import Tensor

from lorafx.adapter_store.peft_config import PeftConfig


@dataclass(frozen=True, eq=False)
class AdapterSource:
    """Where an adapter comes from, with what its files do not say.

    It stands wherever an adapter's folder may: among the adapters of `lorafx.compile`, and in
    `load_adapter`.

    Attributes:
        source: a folder; one file (safetensors, or a pickle of tensors); a name on the Hugging Face
            hub ("owner/name"); the bytes of a file; or tensors by name.
        config: the adapter's configuration: a dict of the fields that its dialect's configuration
            has (adapter_config.json's), or a `peft.LoraConfig`. None for what lies beside the
            tensors: adapter_config.json, or the metadata of a safetensors file.
        dialect: "peft", "diffusers", "kohya", "mlx" or "loralib"; None tells it by the keys.
        component: for files with factors for several models of a pipeline, which one this model is
            ("unet", "transformer", "text_encoder", ...). None tells it by the names.
        key_mapping: regular expressions and what replaces them in the paths of modules, one after
            the other, as in transformers' `from_pretrained`, for a model whose modules moved.
        revision: branch, tag or commit on the hub.

    `config` and `key_mapping` are copied: an adapter may be read again later.
    """

    source: str | os.PathLike[str] | bytes | Mapping[str, Tensor]
    config: Any = None
    dialect: str | None = None
    component: str | None = None
    key_mapping: Mapping[str, str] | None = None
    revision: str | None = None

    def __post_init__(self) -> None:
        for name in ("config", "key_mapping"):
            value = getattr(self, name)
            if isinstance(value, Mapping):
                object.__setattr__(self, name, deepcopy(dict(value)))
            elif is_dataclass(value):  # PEFT's
                object.__setattr__(self, name, deepcopy(value))


#: What an adapter may be given as.
Source: TypeAlias = "str | os.PathLike[str] | bytes | Mapping[str, Tensor] | AdapterSource"


@dataclass(frozen=True)
class Saved:
    """What a source holds.

    Attributes:
        tensors: saved key -> tensor, on the CPU when read from a file.
        fields: the raw fields of the configuration, or a configuration that was read; None where
            there is none.
        metadata: of a safetensors file.
        where: what messages call it.
        component: as in `AdapterSource`.
    """

    tensors: Mapping[str, Tensor]
    fields: Mapping[str, Any] | PeftConfig | None
    metadata: Mapping[str, str]
    where: str
    component: str | None = None


@dataclass(frozen=True)
class AdapterState:
    """An adapter's configuration and its tensors by PEFT's keys.

    Attributes:
        config: checked configuration.
        tensors: saved key -> tensor, on the CPU when read from a file.
        where: what messages call it.
        scales: s by module path, where it is known better than from the configuration (an
            adapter in memory may have been rescaled; other dialects save α with each module); wins
            over α and r.
        dialect: the dialect that it was saved in.
        left_out: components of a pipeline that its file has factors for, and that are not the
            model that it was read for.
        notes: what was decided while it was read, a line each, for the log and `explain`.
    """

    config: PeftConfig
    tensors: Mapping[str, Tensor]
    where: str
    scales: Mapping[str, float] = field(default_factory=dict)
    dialect: str = "peft"
    left_out: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
