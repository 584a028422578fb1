"""lorafx: a compiler that makes LoRA inference fast and correct for any PyTorch model.

cm = lorafx.compile(model, lora_config)
cm(input_ids, adapter_names=["sql", None, "chat"])

The names below are imported when they are first used: `import lorafx` imports no torch. After
transformers it brings what a first call needs, which is then no part of the first answer's time.
"""

from __future__ import annotations

import functools
import importlib
import sys
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from lorafx.torch_internals.imports import when_imported

if TYPE_CHECKING:
    from lorafx import errors as errors
    from lorafx import layers as layers
    from lorafx.adapter_store.names import Arrow as Arrow
    from lorafx.adapter_store.saved import AdapterSource as AdapterSource
    from lorafx.api import compile as compile
    from lorafx.api import explain as explain
    from lorafx.api import profile as profile
    from lorafx.api import sampler as sampler
    from lorafx.api import why as why
    from lorafx.bisection.search import bisect as bisect
    from lorafx.compiled_model.compiled import CompiledModel as CompiledModel
    from lorafx.compiled_model.sampler import Sampler as Sampler
    from lorafx.compiled_model.xlora import XLora as XLora
    from lorafx.config import After as After
    from lorafx.config import LoraConfig as LoraConfig
    from lorafx.config import Options as Options
    from lorafx.errors import *  # noqa: F403
    from lorafx.generation.continuous.shares import Share as Share
    from lorafx.integrations.diffusers.compiled_pipeline import CompiledPipeline as CompiledPipeline
    from lorafx.integrations.diffusers.compiled_pipeline import compile_pipeline as compile_pipeline
    from lorafx.integrations.torch_compile.attached import adapters as adapters
    from lorafx.integrations.torch_compile.attached import attach as attach
    from lorafx.integrations.torch_compile.attached import detach as detach
    from lorafx.integrations.torch_compile.attached import load_adapter as load_adapter
    from lorafx.integrations.torch_compile.attached import unload_adapter as unload_adapter
    from lorafx.integrations.trl import Rollout as Rollout
    from lorafx.model.quantized import dequantize as dequantize
    from lorafx.package.export import export as export
    from lorafx.package.load import Package as Package
    from lorafx.package.load import load as load
    from lorafx.pass_order import pipeline as pipeline
    from lorafx.registry import register as register
    from lorafx.registry import register_oot as register_oot
    from lorafx.registry import unregister as unregister

__version__ = "0.1.0"

#: The names below by the modules that define them.
_NAMES = {
    "lorafx.adapter_store.names": ("Arrow",),
    "lorafx.adapter_store.saved": ("AdapterSource",),
    "lorafx.api": ("compile", "explain", "profile", "sampler", "why"),
    "lorafx.bisection.search": ("bisect",),
    "lorafx.config": ("After", "LoraConfig", "Options"),
    "lorafx.generation.continuous.shares": ("Share",),
    "lorafx.integrations.diffusers.compiled_pipeline": ("CompiledPipeline", "compile_pipeline"),
    "lorafx.errors": (
        *("BaseWeightsError", "BatchError", "CapacityError", "CaptureError", "CheckpointError"),
        *("ConfigError", "LorafxError", "LorafxWarning", "LoweringError", "MatchError"),
        *("OutOfRangeError", "ProvenanceError", "ReplacedModuleError", "TargetError"),
        *("UnknownAdapterError", "UnsupportedAdapterError", "UnsupportedVersionError"),
        "VerifyError",
    ),
    "lorafx.model.quantized": ("dequantize",),
    "lorafx.integrations.trl": ("Rollout",),
    "lorafx.package.export": ("export",),
    "lorafx.package.load": ("Package", "load"),
    "lorafx.pass_order": ("pipeline",),
    "lorafx.registry": ("register", "register_oot", "unregister"),
    "lorafx.compiled_model.compiled": ("CompiledModel",),
    "lorafx.compiled_model.sampler": ("Sampler",),
    "lorafx.compiled_model.xlora": ("XLora",),
    "lorafx.integrations.torch_compile.attached": (
        *("adapters", "attach", "detach", "load_adapter", "unload_adapter"),
    ),
}
_MODULE_OF = {name: module for module, names in _NAMES.items() for name in names}
_MODULES = ("errors", "layers")

__all__ = sorted([*_MODULE_OF, *_MODULES, "__version__"])


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'lorafx' has no attribute {name!r}")
    home = _MODULE_OF.get(name, f"lorafx.{name}")
    if home != "lorafx.errors":  # all others need torch
        from lorafx.torch_internals.versions import check

        check()
    module = _imported(home)
    if name not in _MODULES:
        globals()[name] = getattr(module, name)
    return globals()[name]


def _imported(module: str) -> Any:
    """Import a module. Raises UnsupportedVersionError if the installed torch is not supported."""
    from lorafx.interrupts import undisturbed
    from lorafx.torch_internals.versions import entrance

    with entrance():
        # A module that defines operators cannot be imported again if it did not come to its end.
        return undisturbed(functools.partial(importlib.import_module, module))


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _import_for_calls() -> None:
    """What stands in its way is raised where a name is used."""
    from lorafx.errors import LorafxError

    with suppress(LorafxError):
        for name in ("compile", "CompiledModel"):
            __getattr__(name)
        _imported("lorafx.runtime.tiers")


def _experts(module: Any, *args: Any, **kwargs: Any) -> Any:
    """`lorafx.layers.experts.forward`."""
    from lorafx.layers.experts import forward

    return forward(module, *args, **kwargs)


def _offer_experts(moe: Any) -> None:
    """Make model.set_experts_implementation("lorafx") known to transformers."""
    if hasattr(moe, "ExpertsInterface"):
        moe.ExpertsInterface.register("lorafx", _experts)


when_imported("transformers.integrations.moe", _offer_experts)
# A process without transformers may run packages only. And not while torch is being imported.
if "transformers" in sys.modules and hasattr(sys.modules.get("torch"), "compile"):
    _import_for_calls()
