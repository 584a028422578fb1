"""Between an op, whose arguments are flat, and its Python functions, which take some together.

    class Bank(NamedTuple): A: Tensor; B: Tensor          op(x, A, B)      function(x, Bank(A, B))

A schema has no structures, and a graph takes each tensor as an input of its own. `flat` is paid
where Python runs an op; the generated kernels are entered past it.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, get_type_hints


def flat(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, taking the fields of each NamedTuple of its signature as arguments of their own,
    by position. Those that torch leaves out, since they are the schema's defaults, are at the end,
    and have the same defaults as fields.

    The result's signature is flat too: torch reads the schema of a `custom_op` from it.
    """
    hints = get_type_hints(function)
    parameters: list[inspect.Parameter] = []
    groups: list[tuple[int, int, Callable[..., Any]]] = []
    for parameter in inspect.signature(function).parameters.values():
        hint = hints.get(parameter.name, parameter.annotation)
        if not _is_named_tuple(hint):
            parameters.append(parameter.replace(annotation=hint))
            continue
        start = len(parameters)
        for name, of_field in get_type_hints(hint).items():
            default = hint._field_defaults.get(name, inspect.Parameter.empty)
            parameters.append(parameter.replace(name=name, annotation=of_field, default=default))
        groups.append((start, len(parameters), hint))
    if not groups:
        return function

    @functools.wraps(function)
    def taken_apart(*arguments: Any, **named: Any) -> Any:
        together: list[Any] = []
        done = 0
        for start, end, group in groups:
            together += arguments[done:start]
            together.append(group(*arguments[start:end]))
            done = end
        return function(*together, *arguments[done:], **named)

    returned = hints.get("return", inspect.Signature.empty)
    signature = inspect.Signature(
        parameters, return_annotation=None if returned is type(None) else returned
    )
    taken_apart.__signature__ = signature  # type: ignore[attr-defined]
    return taken_apart


def _is_named_tuple(hint: Any) -> bool:
    return isinstance(hint, type) and issubclass(hint, tuple) and hasattr(hint, "_fields")
