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
    """Identities of the modules whose `__call__` is running. Where Dynamo cannot break a frame,
    their hooks run after it in separate graphs."""
    return frozenset(map(id, running_modules()))


def running_modules() -> Iterator[nn.Module]:
    """The modules whose `__call__` is running, innermost first."""
    return (frame.f_locals["self"] for frame in _frames() if frame.f_code is CALL)


def python_line() -> str | None:
    """`file:line` of the innermost frame outside torch and lorafx; None while a graph runs."""
    for frame in _frames():
        name = str(frame.f_globals.get("__name__"))
        if _GRAPHS.match(name) or frame.f_code.co_filename.startswith("<eval_with_key>"):
            return None
        if name.partition(".")[0] not in ("torch", "lorafx"):
            return f"{frame.f_code.co_filename}:{frame.f_lineno}"
    return None


def called_directly(by: Callable[[FrameType], bool]) -> bool:
    """Whether `by` holds for the caller of the compiled code, which begins with its arguments."""
    for frame in _frames():
        if by(frame):
            return True
        if not _COMPILERS.fullmatch(str(frame.f_globals.get("__name__"))):
            return False
    return False


def compiled_module() -> nn.Module | None:
    """The module of the running call to a torch.compile wrapper."""
    found: nn.Module | None = None
    wrapped = False
    for frame in _frames():
        if wrapped and frame.f_code in CALLS:
            found = unwrapped(frame.f_locals["self"])
        wrapped = in_wrapper_of_dynamo(frame)
    return found


def unwrapped(module: nn.Module) -> nn.Module:
    """The module without torch.compile's wrapper."""
    while isinstance(module, OptimizedModule):
        inner = module._orig_mod
        assert isinstance(inner, nn.Module)
        module = inner
    return module


def refuse_called_slips(belongs: Callable[[nn.Module], bool], way: str) -> None:
    """Raise ConfigError, as `refuse_slips`, for keywords that would choose an adapter elsewhere in
    the outermost running call; `way` is how adapters are chosen."""
    found: Mapping[str, Any] = {}
    for frame in _frames():
        if frame.f_code is CALL and belongs(unwrapped(frame.f_locals["self"])):
            found = frame.f_locals
    if found and found["kwargs"]:
        module = unwrapped(found["self"])
        refuse_slips(found["kwargs"], module.forward, module, {"": way})


def refuse_pipeline_slips(model: nn.Module) -> None:
    """`refuse_slips` for a transformers pipeline, which hands even valid keywords to a
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
