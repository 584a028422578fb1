"""The ops of strategies that leave the base product to the vendor's GEMM and prepare its operands.

    lorafx::triton_expanded   y0 = v B + b, (M, N); b where a row has no adapter
    lorafx::add_product_      y += x Wᵀ in place: the vendor's GEMM with beta = 1
    lorafx::triton_concat_    v behind the columns of x' = [x | …], B behind those of W' = [W | …]

    expand_first    y = add_product_(triton_expanded(x, b, …), x, Wᵀ)
    concat          y = x' W'ᵀ + b after triton_concat_(x', W', …); "concat_apart" has a product for
                    each sibling over columns of its own

Arguments are those of lorafx.kernels.triton.triton_ops, and so is the way an op runs: its launches
on a GPU, Triton's interpreter on a CPU. `y0` is rounded to y's type before the product is added:

    |ŷ - y| ≤ u |y| + u |y0| + (2K + r + 8) 2⁻²⁴ |y|₁      u = 2⁻⁸ for bfloat16, 2⁻¹¹ for float16

and v is rounded to x's type before it is multiplied by B, which is of that type already:

    |ŷ - y| ≤ u |y| + u Σ_k |v_k| |B_k| + (2K + r + 8) 2⁻²⁴ |y|₁

The columns of other rows' blocks are 0 in x', and what W' has there is a number always: where B of
an adapter is none, its rows are NaN, and nobody else's.

`add_product_` is an op of its own because Inductor takes `aten.addmm` of a matrix as it likes: it
copies y0 into another buffer first, or makes a product and a sum of it, which rounds once more.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lorafx.errors import LoweringError
from lorafx.kernels.ops.bank_arguments import BankArgs
from lorafx.kernels.ops.op_checks import require
from lorafx.kernels.ops.op_library import define
from lorafx.kernels.triton.concat_launch import blocks_of, gather, layout_of, place
from lorafx.kernels.triton.generated_op import generated_op
from lorafx.kernels.triton.launchers import Launch
from lorafx.kernels.triton.triton_build import CONCAT, LaunchPlan, plan_of
from lorafx.kernels.triton.triton_checks import check_linear, checked_plan, require_adjacent
from lorafx.kernels.triton.triton_launch import Base, LaunchArgs, linear, shrink
from lorafx.torch_internals.symbols import guard_or_false


def _run_expanded(
    x: Tensor, bias: Tensor | None, bank: BankArgs, rows: int, kernel: int, launch: Launch
) -> Tensor:
    """The bias and every range's delta for x (M, K): (M, N) of y's dtype, without base product.

    Raises:
        LoweringError: an argument that `kernel` was not made for.
    """
    y = _expanded_fake(x, bias, bank, rows, kernel)
    plan = checked_plan("triton_expanded", kernel, ("expand_first",), bank, rows)
    spec, M = plan.spec, x.shape[0]
    if guard_or_false(M == 0):
        return y
    bias = None if bias is None else bias.contiguous()  # N elements; kernels take no stride of it
    batch = LaunchArgs.of(M, bank, rows, plan.order, launch)
    first, second = plan.kernels.values()
    v = shrink(first, spec, x, batch)
    linear(second, spec, y, v, Base(x, x, bias), batch)
    return y


def _expanded_fake(x, bias, bank: BankArgs, rows, kernel):
    plan = checked_plan("triton_expanded", kernel, ("expand_first",), bank, rows)
    check_linear("triton_expanded", plan, x, bank.A)
    N = plan.spec.out_features
    require(
        "triton_expanded",
        (bias is not None) == plan.spec.bias and (bias is None or bias.shape == (N,)),
        f"the kernel was made {'with' if plan.spec.bias else 'without'} a bias of {N} columns",
    )
    return x.new_empty((x.shape[0], N), dtype=plan.spec.delta.y_dtype)


triton_expanded = generated_op("expanded", _run_expanded, _expanded_fake)


def _run_concat(
    x: Tensor,
    w: Tensor,
    bank: BankArgs,
    rows: int,
    first: int,
    row: int,
    kernel: int,
    launch: Launch,
) -> None:
    """Writes the columns beside x in x' (M, K + …) and beside W in W' (N, K + …), in place.

    Args:
        first: where W's columns begin in W'. In x' those of x begin behind the left columns.
        row: where W's rows begin in W'.

    Raises:
        LoweringError: an argument that `kernel` was not made for.
    """
    plan = _concat_plan(x, w, bank, rows, first, row, kernel)
    spec, M = plan.spec, x.shape[0]
    if guard_or_false(M == 0):
        return
    batch = LaunchArgs.of(M, bank, rows, plan.order, launch)
    behind_w, behind_x = plan.kernels.values()
    flags = gather(behind_w, spec, w, int(first), int(row), batch)
    place(behind_x, spec, x, flags, batch)


def _concat_plan(x, w, bank: BankArgs, rows, first, row, kernel) -> LaunchPlan:
    plan = checked_plan("triton_concat_", kernel, CONCAT, bank, rows)
    d, layout, first = plan.spec.delta, layout_of(plan.spec), int(first)
    left, right = layout.columns(blocks_of(plan.spec, bank))
    K, N = d.in_features, plan.spec.out_features
    require(
        "triton_concat_",
        x.dim() == 2 and x.shape[1] == left + K + right and x.dtype == d.x_dtype,
        f"x' is {x.dtype} {tuple(x.shape)}, the kernel's {d.x_dtype} (M, {left} + {K} + {right})",
    )
    require(
        "triton_concat_",
        bank.A.shape[1] == d.max_rank and bank.A.shape[2] >= (max(d.siblings) + 1) * K,
        f"A is {tuple(bank.A.shape)}, not the kernel's bank's",
    )
    require_adjacent("triton_concat_", x=x)
    require("triton_concat_", w.dim() == 2, f"W' is a matrix, not {w.dim()}-d")
    have, long = w.shape[::-1] if plan.spec.transposed else w.shape
    require(
        "triton_concat_",
        have >= int(row) + N and w.dtype == d.x_dtype,
        f"W' is {w.dtype} {tuple(w.shape)}, the kernel's {d.x_dtype} with {N} rows from {row} on",
    )
    require(
        "triton_concat_",
        first >= left and long >= first + K + right,
        f"W' has {long} columns and x's begin at {first}: {left} before and {right} behind its {K}"
        " are needed",
    )
    return plan


def _concat_fake(x, w, bank: BankArgs, rows, first, row, kernel) -> None:
    _concat_plan(x, w, bank, rows, first, row, kernel)


triton_concat_ = generated_op("concat_", _run_concat, _concat_fake, mutates_args=("x", "w"))


def add_product_(y: Tensor, x: Tensor, right: Tensor) -> None:
    """y (M, N) += x (M, K) right (K, N) in place, rounded once."""
    add_product_fake(y, x, right)
    y.addmm_(x, right)


def add_product_fake(y: Tensor, x: Tensor, right: Tensor) -> None:
    require(
        "add_product_",
        (y.dim(), x.dim(), right.dim()) == (2, 2, 2)
        and (y.dtype, x.dtype) == (right.dtype, right.dtype),
        f"y, x and right are matrices of one type, not {y.dtype} {tuple(y.shape)}, {x.dtype} "
        f"{tuple(x.shape)} and {right.dtype} {tuple(right.shape)}",
    )
    require(
        "add_product_",
        y.shape[0] == x.shape[0] and y.shape[1] == right.shape[1] and x.shape[1] == right.shape[0],
        f"{tuple(x.shape)} times {tuple(right.shape)} is not {tuple(y.shape)}",
    )


define("add_product_(Tensor(a!) y, Tensor x, Tensor right) -> ()", add_product_, add_product_fake)


def _product(x: Tensor, right: Tensor, bias: Tensor | None) -> Tensor:
    return x @ right if bias is None else torch.addmm(bias, x, right)


def vendor_linear(
    strategy: str,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    bank: BankArgs,
    rows: int,
    kernel: int,
    *,
    transposed: bool = False,
) -> Tensor:
    """x Wᵀ + b and the deltas by a strategy of this module, op by op, as `lower` has it in graphs.

    Raises:
        LoweringError: a strategy of another module, or an argument that `kernel` was not made for.
    """
    right = weight if transposed else weight.T
    if strategy in CONCAT:
        plan = plan_of(kernel)
        layout, blocks = layout_of(plan.spec), blocks_of(plan.spec, bank)
        sides = layout.columns(blocks)
        x = torch.nn.functional.pad(x, sides)
        right = torch.nn.functional.pad(right.T, sides).T
        w = right if transposed else right.T
        torch.ops.lorafx.triton_concat_(x, w, *bank, rows, sides[0], 0, kernel)
        if not layout.apart:
            return _product(x, right, bias)
        parts, start = [], 0
        for at, size in zip(layout.places, plan.spec.delta.sizes, strict=True):
            own, columns = slice(*layout.span(at, blocks)), slice(start, start + size)
            part = None if bias is None else bias[columns]
            parts.append(_product(x[:, own], right[own, columns], part))
            start += size
        return torch.cat(parts, 1)
    if strategy != "expand_first":
        raise LoweringError(f"strategy {strategy!r} is none around the vendor's GEMM")
    y = torch.ops.lorafx.triton_expanded(x, bias, *bank, rows, kernel)
    torch.ops.lorafx.add_product_(y, x, right)
    return y
