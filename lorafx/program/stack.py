"""Reads the Python stack: which module's call is running, with which arguments.

Dynamo compiles functions, not calls: `torch.nn.Module` itself always runs in Python, so the stack
contains the `_call_impl` of every module whose call is running.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from types import FrameType
from typing import Any

from torch import nn

from lorafx.model.keywords import refuse_slips
from lorafx.torch_internals.dynamo import CALL, CALLS, OptimizedModule, in_wrapper_of_dynamo

#: Modules between the backend and its caller during compilation.
_COMPILERS = re.compile(r"torch(\._dynamo\..*|\._utils_internal)?|lorafx\..*|contextlib")
#: Modules that make and run graphs.
_GRAPHS = re.compile(r"torch\.(_functorch|_inductor|fx)\b")


def _frames() -> Iterator[FrameType]:
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back


def calling_modules() -> frozenset[int]:
    """The identities of the modules whose `__call__` is running. Where Dynamo cannot break a frame,
    their hooks run after it, in separate graphs."""
    return frozenset(map(id, running_modules()))


def running_modules() -> Iterator[nn.Module]:
    """The modules whose `__call__` is running, innermost first."""
    return (frame.f_locals["self"] for frame in _frames() if frame.f_code is CALL)


def python_line() -> str | None:
    """The `file:line` of the innermost frame outside torch and lorafx; None while a graph runs."""
    for frame in _frames():
        name = str(frame.f_globals.get("__name__"))
        if _GRAPHS.match(name) or frame.f_code.co_filename.startswith("<eval_with_key>"):
            return None
        if name.partition(".")[0] not in ("torch", "lorafx"):
            return f"{frame.f_code.co_filename}:{frame.f_lineno}"
    return None


def called_directly(is_caller: Callable[[FrameType], bool]) -> bool:
    """Whether `is_caller` holds for the frame that called the compiled code with its arguments."""
    for frame in _frames():
        if is_caller(frame):
            return True
        if not _COMPILERS.fullmatch(str(frame.f_globals.get("__name__"))):
            return False
    return False


def compiled_module() -> nn.Module | None:
    """The module of the running call of a torch.compile wrapper."""
    module: nn.Module | None = None
    wrapped = False
    for frame in _frames():
        if wrapped and frame.f_code in CALLS:
            module = unwrapped(frame.f_locals["self"])
        wrapped = in_wrapper_of_dynamo(frame)
    return module


def unwrapped(module: nn.Module) -> nn.Module:
    """The module without torch.compile's wrapper."""
    while isinstance(module, OptimizedModule):
        inner = module._orig_mod
        assert isinstance(inner, nn.Module)
        module = inner
    return module


def refuse_called_slips(belongs: Callable[[nn.Module], bool], way: str) -> None:
    """As `refuse_slips`, for the keywords of the outermost running call of a module for which
    `belongs` holds; `way` is how adapters are chosen."""
    call: Mapping[str, Any] = {}
    for frame in _frames():
        if frame.f_code is CALL and belongs(unwrapped(frame.f_locals["self"])):
            call = frame.f_locals
    if call and call["kwargs"]:
        module = unwrapped(call["self"])
        refuse_slips(call["kwargs"], module.forward, module, {"": way})


def refuse_pipeline_slips(model: nn.Module) -> None:
    """As `refuse_slips`, for the running transformers pipeline: it passes even valid keywords to a
    tokenizer."""
    base: Any = sys.modules.get("transformers.pipelines.base")
    if base is None:
        return
    code = inspect.unwrap(base.Pipeline.__call__).__code__
    frame = next((frame for frame in _frames() if frame.f_code is code), None)
    if frame is None:
        return
    local_names = frame.f_locals
    names = {**local_names.get("preprocess_params", {}), **local_names.get("kwargs", {})}
    way = "the adapter by set_adapter(name) before the call: this pipeline hands no names on"
    refuse_slips(names, local_names["self"].preprocess, model, {"": way})
