"""The ops of strategies that leave the base product to the vendor's GEMM and prepare its operands.

    lorafx::triton_expanded   y0 = v B + b, (M, N); b where a row has no adapter
    lorafx::add_product_      y += x Wᵀ in place: the vendor's GEMM with beta = 1

    expand_first    y = add_product_(triton_expanded(x, b, …), x, Wᵀ)

Arguments are those of lorafx.kernels.triton.triton_ops, and so is the way an op runs: its launches
on a GPU, Triton's interpreter on a CPU. `y0` is rounded to y's type before the product is added:

    |ŷ - y| ≤ u |y| + u |y0| + (2K + r + 8) 2⁻²⁴ |y|₁      u = 2⁻⁸ for bfloat16, 2⁻¹¹ for float16

`add_product_` is an op of its own because Inductor takes `aten.addmm` of a matrix as it likes: it
copies y0 into another buffer first, or makes a product and a sum of it, which rounds once more.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import guard_or_false
from torch.library import custom_op, triton_op

from lorafx.errors import LoweringError
from lorafx.kernels.ops.bank_arguments import BankArgs, flat
from lorafx.kernels.ops.op_checks import require
from lorafx.kernels.ops.op_library import define
from lorafx.kernels.triton.triton_launch import Batch, Launch, linear, shrink
from lorafx.kernels.triton.triton_ops import (
    _check_linear,
    _checked,
    launch_interpreted,
    launch_wrapped,
)


def _run_expanded(
    x: Tensor, bias: Tensor | None, bank: BankArgs, rows: Any, kernel: int, launch: Launch
) -> Tensor:
    y = _expanded_fake(x, bias, bank, rows, kernel)
    plan = _checked("triton_expanded", kernel, ("expand_first",), bank, rows)
    spec, M = plan.spec, x.shape[0]
    if guard_or_false(M == 0):
        return y
    bias = None if bias is None else bias.contiguous()  # N elements; kernels take no stride of it
    batch = Batch.of(M, bank.slots, rows, plan.order, launch)
    first, second = plan.kernels.values()
    v = shrink(first, spec, x, bank, batch, launch)
    linear(second, spec, y, v, (x, x, bias), bank, batch, launch)
    return y


def _expanded_fake(x, bias, bank: BankArgs, rows, kernel):
    plan = _checked("triton_expanded", kernel, ("expand_first",), bank, rows)
    _check_linear("triton_expanded", plan, x, bank.A)
    N = plan.spec.out_features
    require(
        "triton_expanded",
        (bias is not None) == plan.spec.bias and (bias is None or bias.shape == (N,)),
        f"the kernel was made {'with' if plan.spec.bias else 'without'} a bias of {N} columns",
    )
    return x.new_empty((x.shape[0], N), dtype=plan.spec.delta.y_dtype)


@custom_op("lorafx::interpreted_expanded", mutates_args=())
@flat
def interpreted_expanded(
    x: Tensor, bias: Tensor | None, bank: BankArgs, rows: int, kernel: int
) -> Tensor:
    """`triton_expanded` in Triton's interpreter, for tensors on the CPU."""
    return _run_expanded(x, bias, bank, rows, kernel, launch_interpreted)


@triton_op("lorafx::triton_expanded", mutates_args=())
@flat
def triton_expanded(
    x: Tensor, bias: Tensor | None, bank: BankArgs, rows: int, kernel: int
) -> Tensor:
    """The bias and every range's delta for x (M, K): (M, N) of y's dtype, without base product.

    Raises:
        LoweringError: an argument that `kernel` was not made for.
    """
    if x.device.type == "cpu":
        return torch.ops.lorafx.interpreted_expanded(x, bias, *bank, rows, kernel)
    return _run_expanded(x, bias, bank, rows, kernel, launch_wrapped)


triton_expanded.register_fake(flat(_expanded_fake))
interpreted_expanded.register_fake(flat(_expanded_fake))


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
    if strategy != "expand_first":
        raise LoweringError(f"strategy {strategy!r} is none around the vendor's GEMM")
    y = torch.ops.lorafx.triton_expanded(x, bias, *bank, rows, kernel)
    torch.ops.lorafx.add_product_(y, x, right)
    return y
