"""lorafx: a compiler that makes LoRA inference fast and correct for any PyTorch model.

cm = lorafx.compile(model, lora_config)
cm(input_ids, adapter_names=["sql", None, "chat"])
"""

from lorafx.api import compile, explain
from lorafx.compiled import CompiledModel
from lorafx.config import LoraConfig, Options
from lorafx.errors import (
    BatchError,
    CapacityError,
    CaptureError,
    CheckpointError,
    ConfigError,
    LorafxError,
    LorafxWarning,
    LoweringError,
    MatchError,
    ProvenanceError,
    TargetError,
    UnknownAdapterError,
    UnsupportedAdapterError,
    VerifyError,
)
from lorafx.registry import register, unregister

__all__ = [
    "BatchError",
    "CapacityError",
    "CaptureError",
    "CheckpointError",
    "CompiledModel",
    "ConfigError",
    "LoraConfig",
    "LorafxError",
    "LorafxWarning",
    "LoweringError",
    "MatchError",
    "Options",
    "ProvenanceError",
    "TargetError",
    "UnknownAdapterError",
    "UnsupportedAdapterError",
    "VerifyError",
    "compile",
    "explain",
    "register",
    "unregister",
]
