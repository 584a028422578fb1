"""How ops of namespace `lorafx` are defined: a schema, an eager function and a fake function.

    BankArgs    A, B, ranks, scales, slots       in a schema "Tensor A, Tensor B, …"
    Ranges      siblings, offsets, sizes         in a schema "int[] siblings, …"

Python functions take arguments that belong together as a NamedTuple, schemas have them flat; `flat`
translates where Python runs an op. Generated kernels are entered past it.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, get_type_hints

import torch
from torch import Tensor

_LIBRARY = torch.library.Library("lorafx", "FRAGMENT")


class BankArgs(NamedTuple):
    """The bank of one group and the slots of requests; shapes: lorafx.kernels.ops.linear_ops."""

    A: Tensor
    B: Tensor
    ranks: Tensor
    scales: Tensor
    slots: Tensor


class Ranges(NamedTuple):
    """Range j of y has sizes[j] columns: siblings[j]'s delta, by B's columns from offsets[j] on."""

    siblings: Sequence[int]
    offsets: Sequence[int]
    sizes: Sequence[int]


BANK = ", ".join(f"Tensor {name}" for name in BankArgs._fields)
RANGES = ", ".join(f"int[] {name}" for name in Ranges._fields)


def define(
    schema: str,
    eager: Callable[..., object],
    fake: Callable[..., object],
    backward: Callable[..., object] | None = None,
    setup_context: Callable[..., None] | None = None,
) -> None:
    """Define `lorafx::<name>`; `eager` runs on every device, with gradients only by `backward`."""
    name = schema.partition("(")[0]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, flat(eager), "CompositeExplicitAutograd")
    torch.library.register_fake(f"lorafx::{name}", flat(fake), lib=_LIBRARY)
    if backward is not None:
        torch.library.register_autograd(
            f"lorafx::{name}", backward, setup_context=setup_context, lib=_LIBRARY
        )


def define_on(key: str, name: str, eager: Callable[..., object]) -> None:
    """Define `lorafx::<name>` for torch's dispatch key `key`; that of ROCm is "CUDA"."""
    _LIBRARY.impl(name, flat(eager), key)


def define_vmap(name: str, mapped: Callable[..., object]) -> None:
    torch.library.register_vmap(f"lorafx::{name}", mapped, lib=_LIBRARY)


def flat(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` with the fields of each NamedTuple as positional arguments, in its signature too:
    torch reads the schema of a `custom_op` from it. Defaults at the end may be left out."""
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
            if start >= len(arguments):
                break
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
