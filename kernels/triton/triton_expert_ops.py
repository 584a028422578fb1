"""`lorafx::triton_experts`: products with routed experts' weights and their deltas, by generated
Triton kernels. Importing this module registers it.

    y[m] = x[m] W[e]ᵀ + v[m] B[e·S + s]        v[m] = scale · x[m] A[e·S + s]ᵀ

`inputs` is [x], or what x is computed from in the shrink ("activated"). Rows are sorted by expert,
offs (E,) says where each one's end; rows behind the last are set to 0. Nothing of how many rows an
expert has is read on the host. The torch reference is `lorafx::fused_experts`.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from lorafx.kernels.ops.bank_arguments import BankArgs
from lorafx.kernels.ops.fused_experts import check_ends
from lorafx.kernels.ops.op_checks import require
from lorafx.kernels.triton.generated_op import generated_op
from lorafx.kernels.triton.launchers import Launch
from lorafx.kernels.triton.triton_build import EXPERTS
from lorafx.kernels.triton.triton_checks import checked_plan, require_adjacent
from lorafx.kernels.triton.triton_launch import Base, LaunchArgs, activate, linear, shrink
from lorafx.kernels.triton.triton_prologue_ops import check_inputs
from lorafx.torch_internals.symbols import guard_or_false

OP = "triton_experts"


def _run(
    inputs: Sequence[Tensor],
    weight: Tensor,
    offs: Tensor,
    bank: BankArgs,
    rows: int,
    kernel: int,
    launch: Launch,
) -> Tensor:
    """x times the weights of its rows' experts, with every range's delta: (M, N) of y's dtype.

    Raises:
        LoweringError: an argument that `kernel` was not made for.
    """
    plan = checked_plan(OP, kernel, EXPERTS, bank, rows)
    y = _fake(inputs, weight, offs, bank, rows, kernel)
    M = y.shape[0]
    if guard_or_false(M == 0):
        return y
    batch = LaunchArgs.of(M, bank, rows, None, launch, offs)
    first, last = plan.kernels.values()
    if plan.strategy == "activated":
        x, v = activate(first, plan.spec, inputs, batch)
    else:
        x = inputs[0]
        v = shrink(first, plan.spec, x, batch)
    linear(last, plan.spec, y, v, Base(x, weight, None), batch)
    return y


def _fake(inputs, weight, offs, bank: BankArgs, rows, kernel):
    plan = checked_plan(OP, kernel, EXPERTS, bank, rows)
    spec, d = plan.spec, plan.spec.delta
    K, N, E = d.in_features, spec.out_features, spec.experts
    S, M = bank.ranks.shape[0], check_inputs(OP, plan, inputs, bank.A)
    shape = (E, K, N) if spec.transposed else (E, N, K)
    require(
        OP,
        tuple(weight.shape) == shape and weight.dtype == spec.weight_dtype,
        f"the weight is {weight.dtype} {tuple(weight.shape)}, the kernel's {shape}",
    )
    require_adjacent(OP, weight=weight)
    check_ends(OP, offs, E)
    require_adjacent(OP, offs=offs)
    require(OP, S % E == 0, f"{E} experts do not divide {S} slots")
    return inputs[0].new_empty((M, N), dtype=d.y_dtype)


triton_experts = generated_op("experts", _run, _fake)
