"""Problems for the generated Triton kernels, and bounds on what a right kernel may differ by.

    y[m] = y0[m] + Σ_k s · (A x[m])_k B[k],    y0 given, or x Wᵀ + b where the kernel computes it

Kernels sum in float32 in any order and round y once, and where the bank is 16-bit and y is too,
multiply B by v = high + low, two numbers of that type. So, to first order,

    |ŷ - y| ≤ u_y |y| + (2K + r + 8) u |y|₁ + u_v Σ_k |s| (|A||x|)_k |B_k| + u_0 Σ_k |B_k|

"concat" rounds v to x's type: u_y Σ_k |v_k| |B_k| instead of the last two terms.
u = 2⁻²⁴; |y|₁ the sum of the terms' magnitudes; u_v = 2⁻¹⁷ for bfloat16 and 2⁻²¹ for float16;
u_0 = 2⁻²⁵, what float16's subnormals leave of `low`. Asserted is twice that.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from delta_oracle import Problem, dense_delta, of_order_one, random_problem
from torch import Tensor

import lorafx.kernels.triton.ops  # noqa: F401  registers the ops
from lorafx.kernels.triton.build import CONCAT, LINEAR, TritonSpec, build
from lorafx.kernels.triton.tiles import Tiles

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
from tune import concat_linear

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
CPU = torch.device("cpu")
#: Strategies of linears.
STRATEGIES = ("split", "epilogue", "segments", "gemv")
LINEARS = (*STRATEGIES, CONCAT)
lora = torch.ops.lorafx


@dataclass(frozen=True, eq=False)
class Case:
    """A problem with the base's own parameters; `problem.y` is what an adding op starts from."""

    problem: Problem
    weight: Tensor
    bias: Tensor | None = None
    transposed: bool = False

    @property
    def spec(self) -> TritonSpec:
        p = self.problem
        if p.embedding:
            return TritonSpec(p.spec)
        return TritonSpec(p.spec, self.weight.dtype, self.bias is not None, self.transposed)

    def with_(self, **changes: object) -> Case:
        """The same case with other arguments of the problem."""
        return Case(self.problem.with_(**changes), self.weight, self.bias, self.transposed)


def make_case(
    *,
    K: int,
    sizes: Sequence[int],
    slots: Sequence[int],
    rows: int = 1,
    M: int | None = None,
    rank: int = 16,
    capacity: int | None = None,
    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype] = (FP32,) * 3,
    siblings: Sequence[int] | None = None,
    bias: bool = True,
    transposed: bool = False,
    seed: int = 0,
) -> Case:
    """Random arguments of order one; dtypes are those of x, the bank and y.

    Ranks differ between slots and siblings; the first slot in use has the full rank, and from the
    third on every fourth has a sibling without factors. Whatever no row owns is NaN: planes beyond
    a slot's rank, slots that no row has.
    """
    S = max(max(slots, default=0) + 1, 1) if capacity is None else capacity
    ranks = torch.full((S, len(sizes)), rank, dtype=torch.int32)
    for place, slot in enumerate(sorted({slot for slot in slots if slot >= 0})):
        for i in range(len(sizes) if place else 0):
            ranks[slot, i] = 0 if (place + i) % 4 == 2 else 1 + (place * 5 + i) % rank
    made = random_problem(
        x_shape=(len(slots) * rows if M is None else M, K),
        slots=slots,
        rows=rows,
        sizes=sizes,
        max_rank=rank,
        capacity=S,
        dtypes=dtypes,
        siblings=siblings,
        ranks=ranks,
        seed=seed,
    )
    problem = of_order_one(made)
    generator = torch.Generator().manual_seed(seed + 1)
    N = sum(problem.sizes)
    weight, added = (torch.randn(s, generator=generator).to(dtypes[0]) for s in ((N, K), (N,)))
    weight = weight.T.contiguous() if transposed else weight
    return Case(problem, weight, added if bias else None, transposed)


def kernel_of(case: Case, strategy: str, tiles: Mapping[str, Tiles] | None = None) -> int:
    """The id of the case's kernels, for Triton's interpreter."""
    M = case.problem.x.shape[0]
    kernel = build(case.spec, strategy, rows_hint=M, device=CPU, tiles=tiles)
    assert kernel is not None
    return kernel


def run(case: Case, strategy: str, tiles: Mapping[str, Tiles] | None = None) -> Tensor:
    """y by the op of `strategy`; the case's tensors are left alone."""
    p, kernel = case.problem, kernel_of(case, strategy, tiles)
    if strategy in LINEAR:
        return lora.triton_linear(p.x, case.weight, case.bias, *p.bank, p.rows, kernel)
    if strategy == CONCAT:
        base = (p.x, case.weight, case.bias)
        return concat_linear(*base, p.bank, p.rows, kernel, transposed=case.transposed)
    y = p.y.clone()
    op = lora.triton_embedding_delta_ if p.embedding else lora.triton_delta_
    op(y, p.x, *p.bank, p.rows, kernel)
    return y


def base_product(case: Case) -> tuple[Tensor, Tensor]:
    """x Wᵀ + b in float64 and the sum of its terms' magnitudes."""
    x, weight = case.problem.x.double(), case.weight.double()
    weight = weight if case.transposed else weight.T
    exact, magnitude = x @ weight, x.abs() @ weight.abs()
    if case.bias is not None:
        exact, magnitude = exact + case.bias.double(), magnitude + case.bias.double().abs()
    return exact, magnitude


def times_size_of_v(problem: Problem) -> Tensor:
    """Σ_k |s (A x)_k| |B_k| of each row and column, float64."""
    p, start = problem, 0
    found = torch.zeros(p.y.shape, dtype=torch.float64)
    for i, offset, size in zip(*p.ranges, strict=True):
        for m, slot in enumerate(p.owners()):
            r, K = int(p.ranks[slot, i]) if slot >= 0 else 0, p.x.shape[1]
            v = p.scales[slot, i].double() * (
                p.A[slot, :r, i * K : (i + 1) * K].double() @ p.x[m].double()
            )
            b = p.B[slot, :r, offset : offset + size].double()
            found[m, start : start + size] = v.abs() @ b.abs()
        start += size
    return found


def assert_right(case: Case, strategy: str, got: Tensor) -> None:
    """`got`, y of `strategy`, is within the bound of the float64 result."""
    p = case.problem
    start, start_size = (
        base_product(case) if strategy in (*LINEAR, CONCAT) else (p.y.double(), p.y.double().abs())
    )
    exact, magnitude = dense_delta(p.with_(y=start))
    delta_size = magnitude - start.abs()
    magnitude = delta_size + start_size
    terms = (0 if p.embedding else 2 * p.x.shape[-1]) + p.B.shape[1] + 8
    bound = torch.finfo(got.dtype).eps / 2 * exact.abs() + terms * 2.0**-24 * magnitude
    if strategy == "split":  # whose base product may go through y
        product = start if case.bias is None else start - case.bias.double()
        bound += torch.finfo(got.dtype).eps / 2 * product.abs()
    if strategy == CONCAT:  # v is rounded before it is multiplied by B
        bound += torch.finfo(got.dtype).eps / 2 * times_size_of_v(p)
    elif p.B.dtype == got.dtype != FP32:
        bound += (2.0**-17 if got.dtype == BF16 else 2.0**-21) * delta_size
        bound += 2.0**-25 * p.B.shape[1] * p.B.nan_to_num().abs().max().double()
    error = (got.double() - exact).abs()
    assert got.shape == exact.shape
    assert not got.isnan().any(), "NaN from factors that no row owns"
    worst = (error / (2 * bound)).max().item() if error.numel() else 0.0
    assert worst <= 1, f"{strategy}: off by {worst:.3g} times the bound"
    if got.dtype == FP32:
        assert (error <= 1e-5 * (1 + exact.abs() + magnitude)).all()
