"""Ops of namespace `lorafx` for one adapter whose factors lie as they were trained.

    factors        y + scale · (x Aᵀ) Bᵀ, a new tensor of y's dtype
    add_factors_   the same into y in place, plain aten on any device
    run_factors_   the same by a generated kernel (dispatcher.cpp) of that id

x (..., K), y (..., N), A (r, K), B (N, r); scale is a number, or in the overloads `tensor` float32
and 0-d, which is what Dynamo makes of a number that has changed. All rows use the adapter. Sums
are in float32 (float64 where a tensor is float64); y is read and rounded once. Importing this
module registers the ops; no gradient is registered.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import guard_or_true

from lorafx.errors import LoweringError
from lorafx.kernels.delta import accumulation_dtype
from lorafx.kernels.op_library import define

OPERANDS = "Tensor x, Tensor A, Tensor B"
SCHEMAS = tuple(
    schema
    for overload, scale in (("", "float scale"), (".tensor", "Tensor scale"))
    for schema in (
        f"factors{overload}(Tensor y, {OPERANDS}, {scale}) -> Tensor",
        f"add_factors_{overload}(Tensor(a!) y, {OPERANDS}, {scale}) -> ()",
        f"run_factors_{overload}(Tensor(a!) y, {OPERANDS}, {scale}, int kernel) -> ()",
    )
)
Scale = float | Tensor


def _require(condition: bool | torch.SymBool, message: str) -> None:
    if not guard_or_true(condition):
        raise LoweringError(f"lorafx::factors: {message}")


def _check(y: Tensor, x: Tensor, A: Tensor, B: Tensor, scale: Scale) -> None:
    _require(A.dim() == B.dim() == 2, f"A and B are 2-d, not {A.dim()}-d and {B.dim()}-d")
    _require(A.dtype == B.dtype, f"A is {A.dtype} and B {B.dtype}")
    _require(A.shape[0] == B.shape[1], f"A has rank {A.shape[0]} and B {B.shape[1]}")
    _require(x.dim() >= 1 and y.dim() >= 1, "x and y have at least one dimension")
    _require(x.shape[-1] == A.shape[1], f"x has {x.shape[-1]} features, A {A.shape[1]}")
    _require(y.shape[-1] == B.shape[0], f"y has {y.shape[-1]} columns, B {B.shape[0]}")
    # not Size.numel(): that makes symbolic sizes constants
    same_rows = math.prod(x.shape[:-1]) == math.prod(y.shape[:-1])
    _require(same_rows, f"x is {tuple(x.shape)} and y {tuple(y.shape)}: they differ in rows")
    if isinstance(scale, Tensor):
        plain_scale = scale.dtype == torch.float32 and scale.dim() == 0
        _require(plain_scale, f"scale is float32 (), not {scale.dtype} {tuple(scale.shape)}")


def factors(y: Tensor, x: Tensor, A: Tensor, B: Tensor, scale: Scale) -> Tensor:
    """y (..., N) + scale · (x Aᵀ) Bᵀ for x (..., K), contiguous, of y's dtype.

    Raises:
        LoweringError: shapes or dtypes do not fit together.
    """
    _check(y, x, A, B, scale)
    acc = accumulation_dtype(y, x, A)
    v = x.reshape(x.shape[:-1].numel(), x.shape[-1]).to(acc) @ A.to(acc).T * scale
    out = y.to(acc) + (v @ B.to(acc).T).reshape(y.shape)
    return out.to(y.dtype).contiguous()


def factors_fake(y: Tensor, x: Tensor, A: Tensor, B: Tensor, scale: Scale) -> Tensor:
    _check(y, x, A, B, scale)
    return y.new_empty(y.shape)


def add_factors_(y: Tensor, x: Tensor, A: Tensor, B: Tensor, scale: Scale) -> None:
    """`factors` into y in place."""
    y.copy_(factors(y, x, A, B, scale))


def run_factors_(y: Tensor, x: Tensor, A: Tensor, B: Tensor, scale: Scale, kernel: int) -> None:
    """`add_factors_` where there is no generated code: off the CPU."""
    add_factors_(y, x, A, B, scale)


def _in_place_fake(y: Tensor, x: Tensor, A: Tensor, B: Tensor, scale: Scale, *_: int) -> None:
    _check(y, x, A, B, scale)


_IMPLEMENTATIONS: dict[str, tuple[Callable[..., object], Callable[..., object]]] = {
    "factors": (factors, factors_fake),
    "add_factors_": (add_factors_, _in_place_fake),
    "run_factors_": (run_factors_, _in_place_fake),
}
for _schema in SCHEMAS:
    define(_schema, *_IMPLEMENTATIONS[_schema.partition("(")[0].partition(".")[0]])

FACTORS = torch.ops.lorafx.factors
ADD_FACTORS = torch.ops.lorafx.add_factors_
RUN_FACTORS = torch.ops.lorafx.run_factors_
