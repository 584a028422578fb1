"""Differences between the supported versions of torch, and all changes of its settings."""

from __future__ import annotations

import inspect
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor

from lorafx.torch_internals.graph_parts import is_traceable_wrapper_subclass
from lorafx.torch_internals.versions import private_names, torch_minor

with private_names():
    from torch._dynamo import config as dynamo_config
    from torch._dynamo import disable, mark_static
    from torch._dynamo.exc import FailOnRecompileLimitHit
    from torch._functorch import config as functorch_config
    from torch._inductor import config as inductor_config
    from torch.fx.experimental import _config as shape_config

_COMPILE_ARGUMENTS = inspect.signature(torch.compile).parameters


_F = TypeVar("_F", bound=Callable[..., Any])


def untraced(function: _F) -> _F:
    """`function` behind a graph break; what it calls may be compiled. 0.4 µs per call."""
    reason = "lorafx compiled this model by itself"
    disabled: _F = disable(function, reason=reason)
    return disabled


def entry_arguments(recompile_limit: int) -> dict[str, Any]:
    """Arguments of `torch._dynamo.optimize` that give a function its own cache and limit."""
    arguments: dict[str, Any] = {}
    if "isolate_recompiles" in _COMPILE_ARGUMENTS:
        arguments["isolate_recompiles"] = True
    if "recompile_limit" in _COMPILE_ARGUMENTS:
        arguments["recompile_limit"] = recompile_limit
    return arguments


#: Settings that must hold while a graph is captured.
#: - No duck shaping: in a batch of 5 with 5 tokens each, batch and length must be two symbols.
#: - Dynamo must raise at the recompile limit, where it would silently run eager.
#: - Floats that modules hold are constants. With dynamic=True each would be a graph input that is
#:   made into a tensor at every call (26 of them for a Llama of 6 layers).
#: - No freezing of weights: as graph inputs they identify banks, and may be updated.
#: - Guards on weights are checked even if the dictionary that holds them has not changed: torch
#:   2.11 does not notice `weight.data = weight.data.t()`; later versions do.
_CAPTURE: tuple[tuple[Any, str, Any], ...] = (
    (shape_config, "use_duck_shape", False),
    (dynamo_config, "fail_on_recompile_limit_hit", True),
    (dynamo_config, "specialize_float", True),
    (inductor_config, "freezing", False),
)
if hasattr(dynamo_config, "trace_autograd_ops"):
    _CAPTURE += ((dynamo_config, "trace_autograd_ops", True),)
if torch_minor() == "2.11":
    _CAPTURE += ((dynamo_config, "skip_tensor_guards_with_matching_dict_tags", False),)


@contextmanager
def capture_settings(
    recompile_limit: int, *, sizes_by_data: bool = False, symbolic: bool = False
) -> Iterator[None]:
    """The settings of `_CAPTURE`, and the recompile limit if `torch.compile` takes none.

    `sizes_by_data`: operators are captured whose result sizes depend on data; the code after them
    often cannot be. `symbolic`: sizes of arguments are symbols, and fake results are not cached,
    which takes 12 to 20 % less CPU time for 2 or 8 layers of Llama.
    """
    settings = _CAPTURE
    if "recompile_limit" not in _COMPILE_ARGUMENTS:
        settings = (*settings, (dynamo_config, "recompile_limit", recompile_limit))
    if sizes_by_data:
        settings = (*settings, (dynamo_config, "capture_dynamic_output_shape_ops", True))
    if symbolic:
        settings = (*settings, (dynamo_config, "fake_tensor_cache_enabled", False))
    # Settings that hold already are not written, which would take time at every call.
    changed = [item for item in settings if getattr(item[0], item[1]) != item[2]]
    before = [(config, name, getattr(config, name)) for config, name, _ in changed]
    try:
        for item in changed:
            setattr(*item)
        yield
    finally:
        for item in before:
            setattr(*item)


def traced_anew() -> AbstractContextManager[None]:
    return functorch_config.patch(enable_autograd_cache=False)


def is_recompile_limit(error: BaseException) -> bool:
    return isinstance(error, FailOnRecompileLimitHit)


def mode_settings(mode: str | None) -> dict[str, Any]:
    if mode is None or mode == "default":
        return {}
    from torch._inductor import list_mode_options

    return dict(list_mode_options(mode))


def recorded_outputs() -> object | None:
    """transformers' registry of the outputs that model classes record; None if not imported."""
    module = sys.modules.get("transformers.utils.output_capturing")
    return getattr(module, "_CAN_RECORD_REGISTRY", None)


def add_function_guard(manager: Any, function: Callable[[Any], bool]) -> None:
    """Add a guard to a manager of Dynamo's; `function` receives the guarded object."""
    texts = [f"{function.__module__}.{function.__qualname__}"]
    try:
        manager.add_lambda_guard(function, texts, None)
    except TypeError:  # older versions do not take the lines of users
        manager.add_lambda_guard(function, texts)


def mark_fixed_shape(tensor: Tensor, dims: Sequence[int] | None = None) -> None:
    """Make all sizes of `tensor`, or those at `dims`, constants of the graph."""
    fixed = range(tensor.dim()) if dims is None else dims
    if is_traceable_wrapper_subclass(tensor):
        mark_static(tensor, list(fixed))
        return
    # mark_static does this too, but something else while any thread is compiling.
    attributes: Any = tensor
    attributes._dynamo_static_indices = {*getattr(tensor, "_dynamo_static_indices", ()), *fixed}
    attributes._has_dynamo_dim_marking = True


def size_hint(size: int | torch.SymInt) -> int | None:
    """The value of a size at capture; None if it depends on data."""
    if isinstance(size, int):
        return size
    node: Any = size.node
    return int(node.hint) if node.has_hint() else None


_MHA_LOCK = threading.Lock()
#: The running blocks of `no_mha_fast_path` in all threads; "before": the setting before them.
_MHA_BLOCKS: dict[object, bool] = {}


@contextmanager
def no_mha_fast_path() -> Iterator[None]:
    """Disables the fused inference path of MultiheadAttention, which uses weights without calling
    their modules. The setting is one for all threads; the last block that ends restores it."""
    block = object()
    with _MHA_LOCK:
        if not _MHA_BLOCKS:
            _MHA_BLOCKS["before"] = torch.backends.mha.get_fastpath_enabled()
        _MHA_BLOCKS[block] = True
        torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        with _MHA_LOCK:
            _MHA_BLOCKS.pop(block, None)
            if len(_MHA_BLOCKS) == 1:
                torch.backends.mha.set_fastpath_enabled(_MHA_BLOCKS.pop("before"))
