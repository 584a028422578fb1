"""Problems for the kernels of routed experts, beside the same in float64.

y[m] = x[m] W[e]ᵀ + s · (x[m] A[key]ᵀ) B[key],    key = e·S + slot, rows sorted by expert
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from delta_oracle import Problem, dense_delta, of_order_one, random_problem
from torch import Tensor
from triton_cases import CPU, FP32

import lorafx.kernels.triton.ops  # noqa: F401  registers it
from lorafx.kernels.ops.delta_spec import DeltaSpec
from lorafx.kernels.triton.build import TritonSpec, build
from lorafx.kernels.triton.tiles import Tiles

lora = torch.ops.lorafx


@dataclass(frozen=True, eq=False)
class Experts:
    """Arguments of `fused_experts`."""

    x: Tensor
    weight: Tensor
    offs: Tensor
    A: Tensor
    B: Tensor
    ranks: Tensor
    scales: Tensor
    slots: Tensor
    experts: Tensor
    sizes: tuple[int, ...]
    transposed: bool = False

    @property
    def bank(self) -> tuple[Tensor, ...]:
        return self.A, self.B, self.ranks, self.scales, self.slots

    @property
    def ranges(self) -> tuple[list[int], list[int], list[int]]:
        count = len(self.sizes)
        offsets = [sum(self.sizes[:j]) for j in range(count)]
        return list(range(count)), offsets, list(self.sizes)

    @property
    def spec(self) -> TritonSpec:
        y = self.x.new_empty((1, sum(self.sizes)))
        delta = DeltaSpec.linear(y, self.x, self.A, self.B, self.ranks, *self.ranges)
        return TritonSpec(delta, self.weight.dtype, False, self.transposed, len(self.weight))

    def on(self, device: torch.device) -> Experts:
        names = ("x", "weight", "offs", "A", "B", "ranks", "scales", "slots", "experts")
        moved: dict[str, Any] = {name: getattr(self, name).to(device) for name in names}
        return replace(self, **moved)


def make_experts(
    counts: Sequence[int],
    slots: Sequence[int],
    *,
    K: int = 40,
    sizes: Sequence[int] = (24, 20),
    rank: int = 6,
    tail: int = 0,
    capacity: int = 4,
    dtype: torch.dtype = FP32,
    transposed: bool = False,
    int64: bool = False,
    seed: int = 0,
) -> Experts:
    """`counts` rows of each expert, then `tail` of none; the rows have these slots in turn.

    Ranks are unequal; factors that no row owns are NaN.
    """
    E, M = len(counts), sum(counts) + tail
    owner = torch.tensor([slots[m % len(slots)] for m in range(M)], dtype=torch.int32)
    experts = torch.repeat_interleave(torch.arange(E + 1), torch.tensor([*counts, tail])).int()
    places = torch.arange(capacity * E)[:, None] + torch.arange(len(sizes))
    ranks = torch.tensor((rank, 1, 0, rank - 1) if rank > 1 else (1,) * 4, dtype=torch.int32)
    made = random_problem(
        x_shape=(M, K),
        slots=_keys(owner, experts, capacity, E).tolist(),
        rows=1,
        sizes=sizes,
        max_rank=rank,
        capacity=capacity * E,
        dtypes=(dtype,) * 3,
        ranks=ranks[places % 4],
        seed=seed,
    )
    p, ends = of_order_one(made), torch.tensor(counts).cumsum(0)
    shape = (E, K, sum(sizes)) if transposed else (E, sum(sizes), K)
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed + 1))
    return Experts(
        x=p.x,
        weight=(weight / K**0.5).to(dtype),
        offs=ends if int64 else ends.int(),
        A=p.A,
        B=p.B,
        ranks=p.ranks,
        scales=p.scales,
        slots=owner,
        experts=experts,
        sizes=tuple(sizes),
        transposed=transposed,
    )


def _keys(slots: Tensor, experts: Tensor, capacity: int, count: int) -> Tensor:
    return torch.where((slots >= 0) & (experts < count), experts * capacity + slots, -1).int()


def kernel_of(
    case: Experts,
    *,
    device: torch.device = CPU,
    tiles: Mapping[str, Tiles] | None = None,
    rows_hint: int | None = None,
) -> int:
    """The id of the case's kernels; for Triton's interpreter unless another device is given."""
    hint = rows_hint or max(case.x.shape[0] // case.weight.shape[0], 1)
    kernel = build(case.spec, "grouped", rows_hint=hint, device=device, tiles=tiles)
    assert kernel is not None
    return kernel


def run(case: Experts, **kwargs: Any) -> Tensor:
    """y by `triton_experts`, one slot a row."""
    kernel = kernel_of(case, **kwargs)
    return lora.triton_experts(case.x, case.weight, case.offs, *case.bank, 1, kernel)


def exact(case: Experts) -> Tensor:
    """y in float64, row by row; 0 for rows of no expert."""
    E, y = case.weight.shape[0], torch.zeros(case.x.shape[0], sum(case.sizes), dtype=torch.float64)
    for expert in range(E):
        mine, weight = case.experts == expert, case.weight[expert].double()
        y[mine] = case.x[mine].double() @ (weight if case.transposed else weight.T)
    keys = _keys(case.slots, case.experts, case.ranks.shape[0] // E, E)
    bank = (case.A, case.B, case.ranks, case.scales, keys)
    return dense_delta(Problem(y, case.x, *bank, *case.ranges, rows=1))[0]


def assert_right(case: Experts, got: Tensor) -> None:
    want = exact(case)
    assert got.shape == want.shape
    assert not got.isnan().any(), "NaN from factors that no row owns"
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}[got.dtype]
    difference = (got.double() - want).abs()
    assert (difference <= tolerance * (1 + want.abs())).all(), difference.max()
