"""Definition of the ops in namespace `lorafx`, each with a schema, an eager function and a fake
function, and checks of their arguments.

    BankArgs    A, B, ranks, scales, slots       in a schema "Tensor A, Tensor B, …"
    Ranges      siblings, offsets, sizes         in a schema "int[] siblings, …"

Python functions take arguments that belong together as a NamedTuple, and schemas list them; `flat`
converts a call in Python, which calls of generated kernels bypass. Each check takes real or fake
tensors, and raises LoweringError with the op's name and the size or dtype that does not fit.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, NoReturn, get_type_hints

import torch
from torch import Tensor

from lorafx.errors import CaptureError, LoweringError
from lorafx.torch_internals.graph_parts import guard_or_true
from lorafx.torch_internals.transforms import (
    _any_requires_grad,
    below_autograd,
    in_forward_mode,
    transformed,
)

_LIBRARY = torch.library.Library("lorafx", "FRAGMENT")

# torch asks where each fake function is registered, and Python would look for this file among those
# of all modules that were imported: 40 ms of 150 that importing lorafx.compile took.
inspect.modulesbyfile[__file__] = __name__


class BankArgs(NamedTuple):
    """The bank of one group and the slots of requests; shapes: lorafx.kernels.ops.linear_ops."""

    A: Tensor
    B: Tensor
    ranks: Tensor
    scales: Tensor
    slots: Tensor


class Ranges(NamedTuple):
    """Range j of y has sizes[j] columns: siblings[j]'s delta, from column offsets[j] of B on."""

    siblings: Sequence[int]
    offsets: Sequence[int]
    sizes: Sequence[int]


BANK = ", ".join(f"Tensor {name}" for name in BankArgs._fields)
RANGES = ", ".join(f"int[] {name}" for name in Ranges._fields)


def define(
    schema: str,
    eager: Callable[..., object],
    fake: Callable[..., object],
    backward: Callable[..., tuple[object, ...]] | None = None,
    setup_context: Callable[..., None] | None = None,
    *,
    lowered: bool = False,
) -> None:
    """Define `lorafx::<name>`; `eager` runs on all devices. It has gradients by `backward`, and all
    other derivatives raise CaptureError, for torch would take zeros. Not so an op that writes into
    an argument, or is `lowered`: compiled graphs alone call these, and have no derivatives."""
    name = schema.partition("(")[0]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, flat(eager), "CompositeExplicitAutograd")
    torch.library.register_fake(f"lorafx::{name}", flat(fake), lib=_LIBRARY)
    if not (lowered or "!)" in schema):
        item = _Op(getattr(torch.ops.lorafx, name).default, backward, setup_context)
        _LIBRARY.impl(name, functools.partial(_derived, item), "Autograd")


class _Op(NamedTuple):
    run: Any
    backward: Callable[..., tuple[object, ...]] | None
    setup_context: Callable[..., None] | None


def _derived(op: _Op, *arguments: Any) -> Any:
    asked = torch.is_grad_enabled() and _any_requires_grad(*arguments)
    if in_forward_mode() or (asked and transformed()):
        _refuse_derivative(op)
    if asked:
        return _Derived.apply(op, *arguments)
    with below_autograd():
        return op.run(*arguments)


class _Derived(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, op: _Op, *arguments: Any) -> Any:
        ctx.op = op
        with below_autograd():
            result = op.run(*arguments)
        if op.setup_context is not None:
            op.setup_context(ctx, arguments, result)
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        if ctx.op.backward is None:
            _refuse_derivative(ctx.op)
        return (None, *ctx.op.backward(ctx, *gradients))


def _refuse_derivative(op: _Op) -> NoReturn:
    raise CaptureError(
        f"{op.run} has no derivative of this kind. Models that lorafx.compile returns serve a "
        "forward that computes derivatives; to train, use PEFT on the plain model"
    )


def define_on(key: str, name: str, eager: Callable[..., object]) -> None:
    """Define `lorafx::<name>` for a dispatch key of torch's; that of ROCm is "CUDA"."""
    _LIBRARY.impl(name, flat(eager), key)


def define_vmap(name: str, mapped: Callable[..., object]) -> None:
    torch.library.register_vmap(f"lorafx::{name}", mapped, lib=_LIBRARY)


def flat(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` with the fields of each NamedTuple as positional arguments, also in the signature,
    from which torch reads the schema of a `custom_op`. Defaults at the end may be left out."""
    hints = get_type_hints(function)
    parameters: list[inspect.Parameter] = []
    groups: list[tuple[int, int, Callable[..., Any]]] = []
    for parameter in inspect.signature(function).parameters.values():
        hint = hints.get(parameter.name, parameter.annotation)
        is_class = isinstance(hint, type) and issubclass(hint, tuple)
        if not (is_class and hasattr(hint, "_fields")):
            parameters.append(parameter.replace(annotation=hint))
            continue
        start = len(parameters)
        for name, field_hint in get_type_hints(hint).items():
            default = hint._field_defaults.get(name, inspect.Parameter.empty)
            parameters.append(parameter.replace(name=name, annotation=field_hint, default=default))
        groups.append((start, len(parameters), hint))
    if not groups:
        return function

    @functools.wraps(function)
    def call_grouped(*arguments: Any, **kwargs: Any) -> Any:
        grouped: list[Any] = []
        position = 0
        for start, end, group in groups:
            if start >= len(arguments):
                break
            grouped += arguments[position:start]
            grouped.append(group(*arguments[start:end]))
            position = end
        return function(*grouped, *arguments[position:], **kwargs)

    return_hint = hints.get("return", inspect.Signature.empty)
    signature = inspect.Signature(
        parameters, return_annotation=None if return_hint is type(None) else return_hint
    )
    call_grouped.__signature__ = signature  # type: ignore[attr-defined]
    return call_grouped


def require(op: str, condition: bool | torch.SymBool, message: str) -> None:
    """Raise LoweringError unless `condition` holds; one on data-dependent sizes counts as true."""
    if not guard_or_true(condition):
        raise LoweringError(f"lorafx::{op}: {message}")


def check_bank(op: str, bank: BankArgs) -> None:
    """Check dtypes, numbers of dimensions, and that all tensors have as many slots and siblings."""
    A, B, ranks, scales, slots = bank
    require(op, A.dim() == B.dim() == 3, f"A and B are 3-d, not {A.dim()}-d and {B.dim()}-d")
    require(op, A.dtype == B.dtype, f"A is {A.dtype} and B {B.dtype}; a bank has one dtype")
    for name, tensor, dtype, shape in (
        ("ranks", ranks, torch.int32, "(slots, siblings)"),
        ("scales", scales, torch.float32, "(slots, siblings)"),
        ("slots", slots, torch.int32, "(requests,)"),
    ):
        require(
            op,
            tensor.dim() == (1 if name == "slots" else 2) and tensor.dtype == dtype,
            f"{name} is {str(dtype).removeprefix('torch.')} {shape}, "
            f"not {tensor.dtype} {tuple(tensor.shape)}",
        )
    S, G = ranks.shape
    for name, tensor in (("A", A), ("B", B), ("scales", scales)):
        require(op, tensor.shape[0] == S, f"{name} has {tensor.shape[0]} slots, ranks has {S}")
    require(op, scales.shape[1] == G, f"scales has {scales.shape[1]} siblings, ranks has {G}")


def check_by_column(op: str, B: Tensor, **tables: Tensor | None) -> None:
    """Check that DoRA's gains, and shifts, have the slots and columns of the bank."""
    for name, table in tables.items():
        if table is None:
            continue
        expected, shape = (B.shape[0], B.shape[2]), tuple(table.shape)
        require(op, shape == expected, f"{name} is (slots, columns) {expected}, not {shape}")
        require(op, table.dtype == torch.float32, f"{name} is float32, not {table.dtype}")


def check_linear(
    op: str,
    x: Tensor,
    y_features: int | torch.SymInt,
    bank: BankArgs,
    ranges: Ranges,
    features: int | torch.SymInt | None = None,
) -> None:
    """Check that the bank has the features of x, or `features`, and that its ranges fill y."""
    check_bank(op, bank)
    A, (siblings, offsets, sizes) = bank.A, ranges
    G, R, columns = bank.ranks.shape[1], bank.B.shape[1], bank.B.shape[2]
    require(op, x.dim() >= 1 and x.is_floating_point(), "x is a floating-point tensor")
    features = x.shape[-1] if features is None else features
    require(op, A.shape[1] == R, f"A has {A.shape[1]} rows per slot, and B has {R}")
    made_for = A.shape[2] // max(G, 1)
    require(op, A.shape[2] == G * features, f"x has {features} features, A was made for {made_for}")
    require(
        op,
        len(siblings) == len(offsets) == len(sizes),
        f"{len(siblings)} siblings, {len(offsets)} offsets and {len(sizes)} sizes do not pair up",
    )
    require(
        op, sum(sizes) == y_features, f"sizes {list(sizes)} do not fill y's {y_features} columns"
    )
    for i, offset, size in zip(siblings, offsets, sizes, strict=True):
        require(op, i in range(G), f"sibling {i} of a group of {G}")
        require(
            op,
            offset >= 0 and offset + size <= columns,
            f"columns [{offset}, {offset + size}) of a bank of {columns} columns",
        )


def check_rows(
    op: str, x_shape: Sequence[int], y_shape: Sequence[int], rows: int | torch.SymInt
) -> None:
    """Check that x and y, whose sizes without features these are, have as many rows."""
    require(
        op,
        rows >= 0,
        f"rows is {rows}; it must be the number of rows per request, or 0 where ownership is "
        "not proved",
    )
    x_rows, y_rows = math.prod(x_shape), math.prod(y_shape)
    require(op, x_rows == y_rows, f"x has {x_rows} rows and y has {y_rows}")


def check_embedding(
    op: str, ids: Tensor, y: Tensor, bank: BankArgs, rows: int | torch.SymInt
) -> None:
    """Check that the bank is one of an embedding with the columns of y."""
    check_bank(op, bank)
    A, B, N = bank.A, bank.B, y.shape[-1]
    check_rows(op, ids.shape, y.shape[:-1], rows)
    integer = ids.dtype in (torch.int32, torch.int64)
    require(op, integer, f"ids is an integer tensor, not {ids.dtype}")
    require(op, bank.ranks.shape[1] == 1, "an embedding has no siblings")
    require(op, A.shape[2] == B.shape[1], f"A has rank {A.shape[2]} and B {B.shape[1]}")
    require(op, B.shape[2] == N, f"y has {N} columns, B was made for {B.shape[2]}")
