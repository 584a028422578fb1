"""Dynamo: what it traces, its guards, its settings, and the functional graph that follows.

After a graph break in the middle of a layer the owners of rows may be unknown, and a mixed batch is
refused. So Dynamo does not break at two kinds of calls while it converts a frame of lorafx. A
logger's method with a cache (`functools.lru_cache`, as transformers' `warning_once`) is called
during tracing. Hooks that record hidden states and attentions, which transformers registers under a
lock, are registered before the module is traced.
"""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import CodeType, FrameType
from typing import Any

import torch
from torch import Tensor, nn

from lorafx.torch_internals.compat import recorded_outputs
from lorafx.torch_internals.transforms import transformed
from lorafx.torch_internals.versions import private_names

with private_names():
    from torch._C import _log_api_usage_once
    from torch._C._dynamo.guards import GlobalStateGuard, TensorGuards, dict_version
    from torch._dynamo import assume_constant_result, disable, eval_frame, optimize
    from torch._dynamo.convert_frame import input_codes
    from torch._dynamo.eval_frame import OptimizedModule, innermost_fn, set_code_exec_strategy
    from torch._dynamo.exc import (
        ObservedException,
        TorchDynamoException,
        TorchRuntimeError,
        Unsupported,
    )
    from torch._dynamo.guards import GuardBuilder
    from torch._dynamo.source import Source
    from torch._dynamo.symbolic_convert import InstructionTranslator
    from torch._dynamo.trace_rules import check
    from torch._dynamo.types import ConvertFrameReturn, FrameAction, FrameExecStrategy
    from torch._dynamo.variables import ConstantVariable
    from torch._dynamo.variables.misc import LoggingLoggerVariable
    from torch._dynamo.variables.nn_module import UnspecializedNNModuleVariable
    from torch._functorch._aot_autograd.descriptors import (
        InputMutationAOTOutput,
        PlainAOTInput,
        PlainAOTOutput,
    )
    from torch.nn.modules.batchnorm import _NormBase
    from torch.nn.modules.conv import _ConvTransposeNd
    from torch.nn.modules.module import _has_any_global_hook

    #: The code of a module's call, and the code that calls it.
    CALL = nn.Module._call_impl.__code__
    CALLS = (CALL, nn.Module._wrapped_call_impl.__code__)
    _WRAPPERS = eval_frame.__name__


def any_global_hook() -> bool:
    """Whether there are hooks of all modules."""
    return bool(_has_any_global_hook())


def in_wrapper_of_dynamo(frame: FrameType) -> bool:
    """Whether the frame is that of Dynamo's wrapper around a compiled function."""
    return frame.f_globals.get("__name__") == _WRAPPERS


def raised_by_dynamo(error: BaseException) -> bool:
    """Whether Dynamo's wrapper around a compiled function raised the error itself."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and in_wrapper_of_dynamo(trace.tb_frame)


def _call_method(call: Any, image: Any, tx: Any, name: str, args: Any, kwargs: Any) -> Any:
    method: Any = getattr(image.value, name, None)
    cached = isinstance(getattr(method, "__func__", None), functools._lru_cache_wrapper)
    if cached and all(value.is_python_constant() for value in (*args, *kwargs.values())):
        named = {key: value.as_python_constant() for key, value in kwargs.items()}
        if method(*(value.as_python_constant() for value in args), **named) is None:
            return ConstantVariable.create(None)
    return call(image, tx, name, args, kwargs)


def _call_function(call: Any, image: Any, tx: Any, args: Any, kwargs: Any) -> Any:
    if _is_to_record(image.value, kwargs):
        module: Any = sys.modules["transformers.utils.output_capturing"]
        module.maybe_install_capturing_hooks(image.value)
    return call(image, tx, args, kwargs)


def _is_to_record(module: nn.Module, kwargs: Mapping[str, Any]) -> bool:
    """Whether the arguments, or the configuration, of `module` ask it to record outputs."""
    registry: Any = recorded_outputs()
    kinds = None if registry is None else registry.get(module)
    if not kinds:
        return False
    config = getattr(module, "config", None)
    for name in {"output_attentions", *(f"output_{kind}" for kind in kinds)}:
        argument = kwargs.get(name)
        if argument is None:
            requested = getattr(config, name, False)
        else:
            requested = argument.is_python_constant() and argument.as_python_constant()
        if requested:
            return True
    return False


class _ThreadState(threading.local):
    converts = False


_STATE = _ThreadState()
_LOCK = threading.Lock()
#: Methods of Dynamo's classes, and the functions that replace them while this thread converts.
_REPLACEMENTS = (
    (LoggingLoggerVariable, "call_method", _call_method),
    (UnspecializedNNModuleVariable, "call_function", _call_function),
)


@contextmanager
def calls_traced() -> Iterator[None]:
    """Replaces the methods for this thread, which converts a frame of lorafx in the block."""
    _install()
    before, _STATE.converts = _STATE.converts, True
    try:
        yield
    finally:
        _STATE.converts = before


@assume_constant_result
def derives() -> bool:
    """Whether a frame of lorafx is being converted, and the part that is traced may be
    differentiated, is inside of a transform, or is the body of an operator such as torch.cond."""
    if not _STATE.converts:
        return False
    inside = InstructionTranslator.current_tx().output.current_tracer.parent is not None
    return inside or torch.is_grad_enabled() or transformed()


def _install() -> None:
    with _LOCK:
        for cls, name, replacement in _REPLACEMENTS:
            method = getattr(cls, name)
            if not hasattr(method, "_lorafx"):
                setattr(cls, name, _intercepted(method, replacement))


def _intercepted(method: Callable[..., Any], replacement: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)  # keeps attributes that others have set
    def intercepted(*args: Any, **kwargs: Any) -> Any:
        return replacement(method, *args, **kwargs) if _STATE.converts else method(*args, **kwargs)

    setattr(intercepted, "_lorafx", True)  # noqa: B010  for mypy
    return intercepted


def form_guards(tensors: Sequence[Tensor]) -> Any:
    """`check(*tensors)` of the result says whether they have the classes, dtypes, devices, sizes
    and strides that these have."""
    sizes: Any = [list(tensor.shape) for tensor in tensors]
    strides: Any = [list(tensor.stride()) for tensor in tensors]
    return TensorGuards(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides)


def never_traced(code: CodeType) -> None:
    """Exclude functions with this code, and their callees, from tracing."""
    set_code_exec_strategy(code, FrameExecStrategy(FrameAction.SKIP, FrameAction.SKIP))
