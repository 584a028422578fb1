"""Dynamo: what it traces, its guards, its settings, and the functional graph behind it.

Behind a break in the middle of a layer it is not always known which requests a tensor belongs to,
and a mixed batch is refused. So, while Dynamo converts a frame of ours, it does not break at two
kinds of calls. A logger's method that remembers its calls (`functools.lru_cache`, as transformers'
`warning_once`) is called when its call is traced. Hooks that record hidden states and attentions,
which transformers registers under a lock, are registered before the module is traced.
"""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import Any

from torch import nn

from lorafx.torch_internals.compat import recorded_outputs
from lorafx.torch_internals.versions import private_names

with private_names():
    from torch._C import _log_api_usage_once
    from torch._C._dynamo.guards import GlobalStateGuard
    from torch._dynamo import assume_constant_result, disable, eval_frame, optimize
    from torch._dynamo.backends.common import aot_autograd
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

    #: The code of every module's call, and that of its caller.
    CALL = nn.Module._call_impl.__code__
    CALLS = (CALL, nn.Module._wrapped_call_impl.__code__)
    _WRAPPERS = eval_frame.__name__


def in_wrapper_of_dynamo(frame: FrameType) -> bool:
    """Whether the frame is that of Dynamo's wrapper around a compiled function."""
    return frame.f_globals.get("__name__") == _WRAPPERS


def _call_method(call: Any, image: Any, tx: Any, name: str, args: Any, kwargs: Any) -> Any:
    if _log(getattr(image.value, name, None), args, kwargs):
        return ConstantVariable.create(None)
    return call(image, tx, name, args, kwargs)


def _log(method: Any, args: Any, kwargs: Any) -> bool:
    """Call `method`; False where it does not remember its calls, or an argument is in the graph."""
    if not isinstance(getattr(method, "__func__", None), functools._lru_cache_wrapper):
        return False
    if not all(value.is_python_constant() for value in (*args, *kwargs.values())):
        return False
    given = {name: value.as_python_constant() for name, value in kwargs.items()}
    return method(*(value.as_python_constant() for value in args), **given) is None


def _call_function(call: Any, image: Any, tx: Any, args: Any, kwargs: Any) -> Any:
    if _records(image.value, kwargs):
        module: Any = sys.modules["transformers.utils.output_capturing"]
        module.maybe_install_capturing_hooks(image.value)
    return call(image, tx, args, kwargs)


def _records(module: nn.Module, kwargs: Mapping[str, Any]) -> bool:
    """Whether `module` is to record outputs, by Dynamo's arguments, or by its configuration."""
    known: Any = recorded_outputs()
    kinds = None if known is None else known.get(module)
    if not kinds:
        return False
    config = getattr(module, "config", None)
    for name in {"output_attentions", *(f"output_{kind}" for kind in kinds)}:
        given = kwargs.get(name)
        if given is None:
            wanted = getattr(config, name, False)
        else:
            wanted = given.is_python_constant() and given.as_python_constant()
        if wanted:
            return True
    return False


class _Local(threading.local):
    converts = False


_LOCAL = _Local()
_LOCK = threading.Lock()
#: Methods of Dynamo's classes, and what runs in their place while this thread converts.
_INSTEAD = (
    (LoggingLoggerVariable, "call_method", _call_method),
    (UnspecializedNNModuleVariable, "call_function", _call_function),
)


@contextmanager
def calls_traced() -> Iterator[None]:
    """This thread converts a frame of ours; other threads and frames keep Dynamo's methods."""
    _install()
    before, _LOCAL.converts = _LOCAL.converts, True
    try:
        yield
    finally:
        _LOCAL.converts = before


def _install() -> None:
    with _LOCK:
        for image, name, instead in _INSTEAD:
            method = getattr(image, name)
            if not hasattr(method, "_lorafx"):
                setattr(image, name, _intercepted(method, instead))


def _intercepted(method: Callable[..., Any], instead: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)  # what others have noted on it stays there
    def intercepted(*args: Any, **kwargs: Any) -> Any:
        return instead(method, *args, **kwargs) if _LOCAL.converts else method(*args, **kwargs)

    setattr(intercepted, "_lorafx", True)  # noqa: B010  for mypy
    return intercepted
