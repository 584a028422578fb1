"""The delta in float64, row by row, with a bound on what any right implementation may differ by.

    y[m, c] = y0[m, c] + Σ_k s · (Σ_j A[k, j] x[m, j]) · B[k, c]

An implementation that sums in float32 and rounds y once is off by at most

    |ŷ - y| ≤ u_y · |y| + (K + r + 4) · u · |y|₁,    |y|₁ = |y0| + Σ_k |s| (Σ_j |A||x|) |B|

to first order, u = 2⁻²⁴ (2⁻⁵³ for float64) and u_y the unit round-off of y's dtype. The bounds used
here are twice that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lorafx.kernels.ops.delta_spec import DeltaSpec
from lorafx.kernels.ops.op_library import BankArgs, Ranges


@dataclass(frozen=True, eq=False)
class Problem:
    """Arguments of `add_delta_`, or of `add_embedding_delta_` where x holds ids."""

    y: Tensor
    x: Tensor
    A: Tensor
    B: Tensor
    ranks: Tensor
    scales: Tensor
    slots: Tensor
    siblings: list[int]
    offsets: list[int]
    sizes: list[int]
    rows: int

    @property
    def embedding(self) -> bool:
        return not self.x.is_floating_point()

    @property
    def bank(self) -> BankArgs:
        return BankArgs(self.A, self.B, self.ranks, self.scales, self.slots)

    @property
    def ranges(self) -> Ranges:
        return Ranges(self.siblings, self.offsets, self.sizes)

    @property
    def spec(self) -> DeltaSpec:
        if self.embedding:
            return DeltaSpec.of_embedding(self.y, self.A, self.B)
        return DeltaSpec.linear(self.y, self.x, self.A, self.B, self.ranks, *self.ranges)

    def with_(self, **changes: object) -> Problem:
        return replace(self, **changes)  # type: ignore[arg-type]

    def owners(self) -> list[int]:
        """The slot of each row."""
        n, count = self.slots.numel(), self.y.shape[:-1].numel()
        slots = self.slots.tolist()
        return [slots[(m // self.rows if self.rows else 0) % n] for m in range(count)]


def dense_delta(problem: Problem) -> tuple[Tensor, Tensor]:
    """y after the delta and |y|₁, both (M, N) float64."""
    p = problem
    y = p.y.reshape(p.y.shape[:-1].numel(), p.y.shape[-1]).double()
    exact, magnitude = y.clone(), y.abs()
    x = p.x.reshape(-1) if p.embedding else p.x.reshape(y.shape[0], p.x.shape[-1]).double()
    K = p.x.shape[-1]
    for m, slot in enumerate(p.owners()):
        if slot < 0:
            continue
        start = 0
        for i, offset, size in zip(*p.ranges, strict=True):
            r, s = int(p.ranks[slot, i]), p.scales[slot, i].double()
            b = p.B[slot, :r, offset : offset + size].double()
            if p.embedding:
                v = p.A[slot, x[m], :r].double()
                size_of_v = v.abs()
            else:
                a = p.A[slot, :r, i * K : (i + 1) * K].double()
                v, size_of_v = a @ x[m], a.abs() @ x[m].abs()
            exact[m, start : start + size] += s * (v @ b)
            magnitude[m, start : start + size] += s.abs() * (size_of_v @ b.abs())
            start += size
    return exact, magnitude


def assert_delta(problem: Problem, got: Tensor) -> None:
    """`got`, y after an implementation ran, is within the bound of the float64 result."""
    exact, magnitude = dense_delta(problem)
    dtype = got.dtype
    double = torch.float64 in (dtype, problem.x.dtype, problem.A.dtype)
    terms = (1 if problem.embedding else problem.x.shape[-1]) + problem.B.shape[1] + 4
    sums = terms * (2.0**-53 if double else 2.0**-24) * magnitude
    info = torch.finfo(dtype)
    rounding = info.eps / 2 * exact.abs() + info.smallest_normal * info.eps
    error = (got.reshape(exact.shape).double() - exact).abs()
    worst = (error / (2 * (sums + rounding))).max().item() if error.numel() else 0.0
    assert worst <= 1, f"off by {worst:.3g} times the bound"


def assert_delta_joins(p: Problem, bias: Tensor, weight: Sequence[Tensor], kernel: int) -> None:
    """Products with a stored weight that add the delta of `kernel`, one row an owner, have the bits
    of two ops, within the bound."""
    lora, (q, *tables) = torch.ops.lorafx, weight
    for added in (None, bias):
        y = lora.weight_mm(p.x, q, added, None, *tables)
        apart = y.clone()
        lora.run_delta_(apart, p.x, *p.bank, 1, kernel)
        together = lora.weight_mm_delta(p.x, q, *p.bank, 1, kernel, added, None, *tables)
        assert torch.equal(together, apart)
        assert_delta(p.with_(y=y), together)


def random_problem(
    *,
    x_shape: Sequence[int],
    slots: Sequence[int],
    rows: int,
    sizes: Sequence[int] = (13, 17),
    max_rank: int = 5,
    capacity: int = 4,
    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype] = (torch.float32,) * 3,
    siblings: Sequence[int] | None = None,
    vocabulary: int | None = None,
    ranks: Tensor | None = None,
    seed: int = 0,
) -> Problem:
    """Random arguments; dtypes are those of x, the bank and y.

    The bank has a sibling for each of `sizes`; `siblings` picks those that y has columns for.
    Planes beyond a slot's rank hold NaN, so an implementation that reads them is found out. Without
    `ranks` (capacity, siblings) those run down from the largest to 0. With `vocabulary`, x holds
    ids.
    """
    generator = torch.Generator().manual_seed(seed)

    def random(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    G, R, columns = len(sizes), max_rank, sum(sizes)
    picked = list(range(G)) if siblings is None else list(siblings)
    offsets = [sum(sizes[:i]) for i in picked]
    x_dtype, bank_dtype, y_dtype = dtypes
    if ranks is None:
        step = max(R // capacity, 1)
        found = [[max(R - (s + i) * step, 0) for i in range(G)] for s in range(capacity)]
        ranks = torch.tensor(found, dtype=torch.int32)
    if vocabulary is None:
        x = random(x_shape, x_dtype)
        K = x_shape[-1]
        A = random((capacity, R, G * K), bank_dtype)
        leading = tuple(x_shape[:-1])
        for s in range(capacity):
            for i in range(G):
                A[s, int(ranks[s, i]) :, i * K : (i + 1) * K] = torch.nan
    else:
        x = torch.randint(0, vocabulary, tuple(x_shape), generator=generator)
        A = random((capacity, vocabulary, R), bank_dtype)
        leading = tuple(x_shape)
        for s in range(capacity):
            A[s, :, int(ranks[s, 0]) :] = torch.nan
    B = random((capacity, R, columns), bank_dtype)
    for s in range(capacity):
        for i in range(G):
            B[s, int(ranks[s, i]) :, sum(sizes[:i]) : sum(sizes[: i + 1])] = torch.nan
    kept = [sizes[i] for i in picked]
    return Problem(
        y=random((*leading, sum(kept)), y_dtype),
        x=x,
        A=A,
        B=B,
        ranks=ranks,
        scales=random((capacity, G), torch.float32),
        slots=torch.tensor(list(slots), dtype=torch.int32),
        siblings=picked,
        offsets=offsets,
        sizes=kept,
        rows=rows,
    )


def of_order_one(problem: Problem) -> Problem:
    """The same problem with x A and v B of order one, and NaN in the slots that no row has."""
    p, K, R = problem, problem.x.shape[-1], problem.B.shape[1]
    x, B = (p.x.float() / K**0.5).to(p.x.dtype), (p.B.float() / R).to(p.B.dtype)
    unread = [slot for slot in range(len(B)) if slot not in p.owners()]
    p.A[unread] = B[unread] = torch.nan
    return p.with_(x=x, B=B)


def sharing_room(problem: Problem, slot_rank: int) -> Problem:
    """The same problem over a bank whose slots begin `slot_rank` rows apart.

    Slots 0, w, 2·w, … hold what 0, 1, 2, … held, w being the slots that the largest rank takes.
    What is between them is NaN, in memory that they share."""
    p, (S, R, columns) = problem, problem.B.shape
    w = -(-R // slot_rank)
    count = (S - 1) * w + 1
    rows = (count - 1) * slot_rank + R
    B = torch.full((rows, columns), torch.nan, dtype=p.B.dtype)
    B = B.as_strided((count, R, columns), (slot_rank * columns, columns, 1))
    A = torch.full((rows * (p.A.shape[1] if p.embedding else p.A.shape[2]),), torch.nan)
    if p.embedding:
        A = A.to(p.A.dtype).as_strided((count, p.A.shape[1], R), (slot_rank, rows, 1))
    else:
        width = p.A.shape[2]
        A = A.to(p.A.dtype).as_strided((count, R, width), (slot_rank * width, width, 1))
    ranks = torch.zeros((count, p.ranks.shape[1]), dtype=torch.int32)
    scales = torch.full(ranks.shape, torch.nan)
    for slot in range(S):
        live = int(p.ranks[slot].max())
        B[slot * w, :live] = p.B[slot, :live]
        if p.embedding:
            A[slot * w, :, :live] = p.A[slot, :, :live]
        else:
            A[slot * w, :live] = p.A[slot, :live]
        ranks[slot * w], scales[slot * w] = p.ranks[slot], p.scales[slot]
    slots = torch.where(p.slots < 0, p.slots, p.slots * w)
    return p.with_(A=A, B=B, ranks=ranks, scales=scales, slots=slots)


def assert_product(got: Tensor, x: Tensor, W: Tensor, bias: Tensor | None = None) -> None:
    """x Wᵀ + bias, W in float64, within the rounding of W to the dtype of x, of K products, their
    float32 sums and y (Higham, Accuracy and Stability of Numerical Algorithms, 3.1 and 3.5)."""
    assert got.dtype == x.dtype
    assert got.is_contiguous()
    precise, sums = torch.finfo(x.dtype).eps, torch.finfo(torch.float32).eps
    want, size = x.double() @ W.T, x.double().abs() @ W.abs().T
    if bias is not None:
        want, size = want + bias.double(), size + bias.double().abs()
    bound = precise * (want.abs() + size / 2) + (x.shape[1] + 2) * sums * size + 1e-7
    assert bool(((got.double() - want).abs() <= bound).all())
