"""What an op takes of a bank: written once for all schemas, one argument of the functions behind.

    BankArgs    A, B, ranks, scales, slots       in a schema "Tensor A, Tensor B, …"
    Ranges      siblings, offsets, sizes         in a schema "int[] siblings, …"

A schema has no structures, and a graph takes each tensor as an input of its own. So the arguments
of an op are flat, its Python functions take them together, and `flat` stands between the two. It is
paid where Python runs an op; the generated kernels are entered past it.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, get_type_hints

from torch import Tensor


class BankArgs(NamedTuple):
    """The bank of one group and the owners of the rows; see lorafx.kernels.ops.ops for the
    shapes."""

    A: Tensor
    B: Tensor
    ranks: Tensor
    scales: Tensor
    slots: Tensor


class Ranges(NamedTuple):
    """The column ranges of y. The j-th has sizes[j] columns and gets the delta of siblings[j], by
    the columns of B from offsets[j] on."""

    siblings: Sequence[int]
    offsets: Sequence[int]
    sizes: Sequence[int]


BANK = ", ".join(f"Tensor {name}" for name in BankArgs._fields)
RANGES = ", ".join(f"int[] {name}" for name in Ranges._fields)


def flat(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, taking the fields of each BankArgs and Ranges as arguments of their own.

    Those have no defaults, so an op's call has them all by position. The result's signature is
    flat too: torch reads the schema of a `custom_op` from it.
    """
    hints = get_type_hints(function)
    parameters: list[inspect.Parameter] = []
    groups: list[tuple[int, int, Callable[..., Any]]] = []
    for parameter in inspect.signature(function).parameters.values():
        hint = hints.get(parameter.name, parameter.annotation)
        if hint not in (BankArgs, Ranges):
            parameters.append(parameter.replace(annotation=hint))
            continue
        start = len(parameters)
        for name, of_field in get_type_hints(hint).items():
            parameters.append(parameter.replace(name=name, annotation=of_field))
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
