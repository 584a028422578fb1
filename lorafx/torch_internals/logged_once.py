"""Messages that are logged once do not break graphs.

Dynamo breaks a graph at every method of a logger. Behind a break in the middle of a layer it is not
always known which requests a tensor belongs to, so that a mixed batch would be refused for a
warning (transformers' `sdpa` gives one where `output_attentions=True` asks for what it does not
have). A method that remembers its calls (`functools.lru_cache`) runs once for equal arguments,
whoever calls it, and returns nothing: so it is called when its call is traced, and the graph has
nothing of it.
"""

from __future__ import annotations

import functools
from typing import Any

from lorafx.torch_internals.entries import Required, private_names
from lorafx.torch_internals.interception import Interception

ENTRY = Required(
    use="a method of a logger that runs once does not break a graph",
    ended_by="a setting of Dynamo's that calls such methods while it traces; "
    "torch.compiler.config.ignore_logging_functions drops the message",
)

with private_names():
    from torch._dynamo.variables import ConstantVariable
    from torch._dynamo.variables.misc import LoggingLoggerVariable


def _call_method(call: Any, image: Any, tx: Any, name: str, args: Any, kwargs: Any) -> Any:
    if _log(getattr(image.value, name, None), args, kwargs):
        return ConstantVariable.create(None)
    return call(image, tx, name, args, kwargs)


def _log(method: Any, args: Any, kwargs: Any) -> bool:
    """Call `method` with these arguments, as Dynamo has them; False where it is not one of those,
    or an argument is known to the graph alone."""
    if not isinstance(getattr(method, "__func__", None), functools._lru_cache_wrapper):
        return False
    if not all(value.is_python_constant() for value in (*args, *kwargs.values())):
        return False
    given = {name: value.as_python_constant() for name, value in kwargs.items()}
    return method(*(value.as_python_constant() for value in args), **given) is None


_METHODS = Interception(LoggingLoggerVariable, "call_method", _call_method)

#: Inside, this thread converts a frame of ours.
logged_once = _METHODS.on
