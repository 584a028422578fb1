"""lorafx: a compiler that makes LoRA inference fast and correct for any PyTorch model.

cm = lorafx.compile(model, lora_config)
cm(input_ids, adapter_names=["sql", None, "chat"])
"""

from lorafx.adapter_store.saved import AdapterSource
from lorafx.api import attach, compile, explain
from lorafx.config import After, LoraConfig, Options
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
    ReplacedModuleError,
    TargetError,
    UnknownAdapterError,
    UnsupportedAdapterError,
    VerifyError,
)
from lorafx.model.out_of_tree import register_oot, unregister_oot
from lorafx.model.quantized import dequantize
from lorafx.pipeline import pipeline
from lorafx.registry import register, unregister
from lorafx.serving.compiled import CompiledModel
from lorafx.torch_compile.attached import adapters, detach, load_adapter, unload_adapter

__all__ = [
    "AdapterSource",
    "After",
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
    "ReplacedModuleError",
    "TargetError",
    "UnknownAdapterError",
    "UnsupportedAdapterError",
    "VerifyError",
    "adapters",
    "attach",
    "compile",
    "dequantize",
    "detach",
    "explain",
    "load_adapter",
    "pipeline",
    "register",
    "register_oot",
    "unload_adapter",
    "unregister",
    "unregister_oot",
]
