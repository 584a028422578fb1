"""Saving and loading of graphs: Dynamo's code and guards for a frame, the compiled graph, and the
wrappers that AOTAutograd puts around it.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lorafx.torch_internals.versions import private_names

with private_names():
    from torch._dynamo.bytecode_transformation import unique_id
    from torch._dynamo.convert_frame import get_compile_id, output_codes
    from torch._dynamo.eval_frame import _debug_get_cache_entry_list
    from torch._dynamo.guards import (
        CheckFunctionManager,
        GuardManagerWrapper,
        ShapeCodeParts,
        _get_closure_vars,
        convert_int_to_concrete_values,
    )
    from torch._dynamo.output_graph import OutputGraphCommon, OutputGraphGuardsState
    from torch._dynamo.package import SerializedCode
    from torch._dynamo.source import TensorProperty, TensorPropertySource
    from torch._dynamo.symbolic_convert import InstructionTranslator
    from torch._dynamo.types import GuardedCode, wrap_guarded_code
    from torch._dynamo.utils import CleanupHook, CleanupManager, orig_code_map
    from torch._functorch._aot_autograd import graph_compile
    from torch._functorch._aot_autograd.aot_autograd_result import (
        BundledAOTAutogradResult,
        BundledCompiledForward,
    )
    from torch._guards import Guard, GuardsSet
    from torch._inductor.cudagraph_utils import BoxedDeviceIndex
    from torch._inductor.output_code import CompiledFxGraph
    from torch._inductor.utils import BoxedBool
    from torch.autograd import forward_ad
    from torch.fx._graph_pickler import GraphPickler, Options
    from torch.utils import _device
    from torch.utils._ordered_set import OrderedSet


def default_device() -> object:
    """The device of `torch.set_default_device`; None if none is set."""
    return _device.CURRENT_DEVICE


def forward_level() -> int:
    """The level of forward-mode gradients; -1 outside of all levels."""
    return forward_ad._current_level


@contextmanager
def inference_info_noted() -> Iterator[list[tuple[Any, ...]]]:
    """Collects what AOTAutograd would cache of each graph that this thread compiles in the block:
    (configuration, metadata, subclasses, lowered graph, ..., wrappers)."""
    infos: list[tuple[Any, ...]] = []
    thread = threading.get_ident()
    original: Any = getattr(graph_compile, "_cache_inference_info", None)
    if original is None:
        yield infos
        return

    def noting(*arguments: Any) -> Any:
        entry = original(*arguments)  # which makes the metadata picklable
        if threading.get_ident() == thread:
            infos.append(arguments)
        return entry

    setattr(graph_compile, "_cache_inference_info", noting)  # noqa: B010  for mypy
    try:
        yield infos
    finally:
        setattr(graph_compile, "_cache_inference_info", original)  # noqa: B010
