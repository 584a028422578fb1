"""lorafx: a compiler that makes LoRA inference fast and correct for any PyTorch model.

cm = lorafx.compile(model, lora_config)
cm(input_ids, adapter_names=["sql", None, "chat"])

The names below are imported when they are first used: `import lorafx` imports neither torch nor
what compiling needs.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lorafx import errors, layers
    from lorafx.adapter_store.saved import AdapterSource
    from lorafx.api import attach, bisect, compile, explain, profile, why
    from lorafx.config import After, LoraConfig, Options
    from lorafx.diffusers.compiled_pipeline import CompiledPipeline, compile_pipeline
    from lorafx.errors import (
        BaseWeightsError,
        BatchError,
        CapacityError,
        CaptureError,
        CheckpointError,
        ConfigError,
        LorafxError,
        LorafxWarning,
        LoweringError,
        MatchError,
        OutOfRangeError,
        ProvenanceError,
        ReplacedModuleError,
        TargetError,
        UnknownAdapterError,
        UnsupportedAdapterError,
        UnsupportedVersionError,
        VerifyError,
    )
    from lorafx.model.out_of_tree import register_oot, unregister_oot
    from lorafx.model.quantized import dequantize
    from lorafx.pass_order import pipeline
    from lorafx.registry import register, unregister
    from lorafx.serving.compiled import CompiledModel
    from lorafx.torch_compile.attached import adapters, detach, load_adapter, unload_adapter

__version__ = "0.1.0"

__all__ = [
    "AdapterSource",
    "After",
    "BaseWeightsError",
    "BatchError",
    "CapacityError",
    "CaptureError",
    "CheckpointError",
    "CompiledModel",
    "CompiledPipeline",
    "ConfigError",
    "LoraConfig",
    "LorafxError",
    "LorafxWarning",
    "LoweringError",
    "MatchError",
    "Options",
    "OutOfRangeError",
    "ProvenanceError",
    "ReplacedModuleError",
    "TargetError",
    "UnknownAdapterError",
    "UnsupportedAdapterError",
    "UnsupportedVersionError",
    "VerifyError",
    "__version__",
    "adapters",
    "attach",
    "bisect",
    "compile",
    "compile_pipeline",
    "dequantize",
    "detach",
    "errors",
    "explain",
    "layers",
    "load_adapter",
    "pipeline",
    "profile",
    "register",
    "register_oot",
    "unload_adapter",
    "unregister",
    "unregister_oot",
    "why",
]

#: Modules of the names that are no errors.
_HOMES = {
    "lorafx.adapter_store.saved": ("AdapterSource",),
    "lorafx.api": ("attach", "bisect", "compile", "explain", "profile", "why"),
    "lorafx.config": ("After", "LoraConfig", "Options"),
    "lorafx.diffusers.compiled_pipeline": ("CompiledPipeline", "compile_pipeline"),
    "lorafx.model.out_of_tree": ("register_oot", "unregister_oot"),
    "lorafx.model.quantized": ("dequantize",),
    "lorafx.pass_order": ("pipeline",),
    "lorafx.registry": ("register", "unregister"),
    "lorafx.serving.compiled": ("CompiledModel",),
    "lorafx.torch_compile.attached": ("adapters", "detach", "load_adapter", "unload_adapter"),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}
_MODULES = ("errors", "layers")


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'lorafx' has no attribute {name!r}")
    if name in _HOME_OF or name == "layers":  # all but errors need what is installed
        from lorafx.torch_internals.versions import check

        check()
    if name in _MODULES:
        return _imported(f"lorafx.{name}")
    value = getattr(_imported(_HOME_OF.get(name, "lorafx.errors")), name)
    globals()[name] = value
    return value


def _imported(module: str) -> Any:
    """Raises UnsupportedVersionError where lorafx does not support the installed torch."""
    from lorafx.torch_internals.entrances import entrance

    with entrance():
        return importlib.import_module(module)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
