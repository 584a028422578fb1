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
    from torch import _C
    from torch._dynamo import config as dynamo_config
    from torch._dynamo import disable, mark_static
    from torch._dynamo.exc import FailOnRecompileLimitHit
    from torch._functorch import config as functorch_config
    from torch._inductor import config as inductor_config
    from torch.fx.experimental import _config as shape_config

_COMPILE_ARGUMENTS = inspect.signature(torch.compile).parameters


_F = TypeVar("_F", bound=Callable[..., Any])


def untraced(function: _F) -> _F:
    """`function` behind a break of Dynamo's graph; what it compiles is compiled. 0.4 µs a call."""
    reason = "lorafx compiled this model by itself"
    made: _F = disable(function, reason=reason)
    return made


def entry_arguments(recompile_limit: int) -> dict[str, Any]:
    """Arguments of `torch._dynamo.optimize` for a cache and a limit of the function's own."""
    found: dict[str, Any] = {}
    if "isolate_recompiles" in _COMPILE_ARGUMENTS:
        found["isolate_recompiles"] = True
    if "recompile_limit" in _COMPILE_ARGUMENTS:
        found["recompile_limit"] = recompile_limit
    return found


#: Settings that must hold while a graph is captured.
#: - No duck shaping: a batch of 5 with 5 tokens must not make batch and length one symbol.
#: - Past the recompile limit Dynamo would silently run eager: make it raise instead.
#: - Floats that modules hold are constants. Under dynamic=True each would be a graph input that
#:   is made into a tensor on every call (26 of them for a Llama of 6 layers).
#: - No freezing of weights: they are graph inputs, which adapters and new weights are found by.
#: - Weights are looked at although nobody has written to the dictionary that holds them: torch 2.11
#:   takes `weight.data = weight.data.t()` for the weight from before. Later ones do not.
_CAPTURE: tuple[tuple[Any, str, Any], ...] = (
    (shape_config, "use_duck_shape", False),
    (dynamo_config, "fail_on_recompile_limit_hit", True),
    (dynamo_config, "specialize_float", True),
    (inductor_config, "freezing", False),
)
if torch_minor() == "2.11":
    _CAPTURE += ((dynamo_config, "skip_tensor_guards_with_matching_dict_tags", False),)


@contextmanager
def capture_settings(
    recompile_limit: int,
    *,
    sizes_by_data: bool = False,
    symbolic: bool = False,
) -> Iterator[None]:
    """The settings of `_CAPTURE`, and the recompile limit where `torch.compile` takes none.

    `sizes_by_data`: capture operators whose results' sizes depend on data; Python often cannot
    follow. `symbolic`: sizes of arguments are symbols, and fake results are not cached: 12 to 20 %
    less CPU time for 2 or 8 layers of Llama.
    """
    wanted = _CAPTURE
    if "recompile_limit" not in _COMPILE_ARGUMENTS:
        wanted = (*wanted, (dynamo_config, "recompile_limit", recompile_limit))
    if sizes_by_data:
        wanted = (*wanted, (dynamo_config, "capture_dynamic_output_shape_ops", True))
    if symbolic:
        wanted = (*wanted, (dynamo_config, "fake_tensor_cache_enabled", False))
    # Right settings are not written: every call does this.
    changed = [item for item in wanted if getattr(item[0], item[1]) != item[2]]
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
    """transformers' table of outputs that classes of models record; None if not imported."""
    module = sys.modules.get("transformers.utils.output_capturing")
    return getattr(module, "_CAN_RECORD_REGISTRY", None)


def add_function_guard(manager: Any, function: Callable[[Any], bool]) -> None:
    """Add `function`, which is given the guarded object, to a manager of Dynamo's guards."""
    said = [f"{function.__module__}.{function.__qualname__}"]
    try:
        manager.add_lambda_guard(function, said, None)
    except TypeError:  # before it took the lines of users
        manager.add_lambda_guard(function, said)


def mark_fixed_shape(tensor: Tensor, dims: Sequence[int] | None = None) -> None:
    """Make sizes of `tensor`, or `dims`, constants, as Dynamo does for torch.nn's modules alone."""
    fixed = range(tensor.dim()) if dims is None else dims
    if is_traceable_wrapper_subclass(tensor):
        mark_static(tensor, list(fixed))
        return
    # mark_static does so where nothing compiles, and another thing while any thread does.
    found: Any = tensor
    found._dynamo_static_indices = {*getattr(tensor, "_dynamo_static_indices", ()), *fixed}
    found._has_dynamo_dim_marking = True


def size_hint(size: int | torch.SymInt) -> int | None:
    """A size when the graph was captured; None where it depends on data."""
    if isinstance(size, int):
        return size
    node: Any = size.node
    return int(node.hint) if node.has_hint() else None


_MHA_LOCK = threading.Lock()
#: The running blocks of `no_mha_fast_path`, of any thread, and what was "before" them.
_MHA_BLOCKS: dict[object, bool] = {}


@contextmanager
def no_mha_fast_path() -> Iterator[None]:
    """Keep MultiheadAttention off its fused inference path, which takes the weights past every
    module and mark. It is one switch for all threads: the last block to end puts it back."""
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


def transform() -> str | None:
    """The transform that replaces tensors by others without readable numbers, or None. 0.2 µs."""
    if _C._functorch.peek_interpreter_stack() is not None:
        return "torch.func (vmap, grad, functionalize)"
    if _C._get_tracing_state() is not None:
        return "torch.jit.trace"
    kinds = _C._TorchDispatchModeKey
    if _C._len_torch_dispatch_stack() and any(
        _C._get_dispatch_mode(kind) is not None
        for kind in (kinds.FAKE, kinds.PROXY, kinds.FUNCTIONAL)
    ):
        return "torch.export, make_fx or a FakeTensorMode"
    return None


def tracing() -> bool:
    """Whether this thread traces; torch.compiler.is_compiling() also looks at other threads."""
    return torch.compiler.is_dynamo_compiling() or (
        torch.compiler.is_compiling() and transform() is not None
    )
