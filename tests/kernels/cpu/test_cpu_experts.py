"""The generated CPU kernel of routed rows against float64: keys from slots and experts, or from the
ends of sorted groups; siblings that share an A; layouts, threads, bad arguments."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from delta_oracle import Problem, assert_delta, random_problem
from toolchain import needs_compiler
from torch import Tensor

from lorafx.kernels.cpu.delta_kernels import build, build_all, delta_call
from lorafx.kernels.ops.delta_spec import DeltaSpec

lora = torch.ops.lorafx
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16


pytestmark = needs_compiler

SLOTS = 3
# E, K, largest rank, sibling sizes, dtype
GRID = {
    "gate and up": (5, 77, 5, (13, 17), FP32),
    "gate and up bf16": (5, 64, 16, (96, 33), BF16),
    "down fp16": (5, 33, 8, (130,), FP16),
    "one expert": (1, 24, 4, (30,), FP32),
    "many experts": (67, 9, 2, (7,), BF16),
}
# slots of the requests, rows a request, rows in all; chosen so that requests wrap around too
BATCHES = {
    "decode": ((2, -1, 0, 1, 1), 2, 10),
    "a slot a row": ((2, -1, 0, 1, 1, 0, 2), 1, 7),
    "one row": ((1,), 1, 1),
    "prefill": ((0, -1, 1, 2), 60, 240),
    "base rows only": ((-1, -1), 3, 6),
    "no rows": ((0,), 1, 0),
}
# which experts the rows of a batch go to
ROUTES = {
    "any": lambda count, rows: torch.randint(0, count, (rows,)),
    "one expert": lambda count, rows: torch.full((rows,), count - 1),
    "and beyond": lambda count, rows: torch.randint(-1, count + 2, (rows,)),
}


@dataclass(frozen=True, eq=False)
class Routed:
    """Arguments of `run_expert_delta_`; `keyed` has the bank's slot of each row as its slots."""

    keyed: Problem
    alike: Tensor
    slots: Tensor
    experts: Tensor
    rows: int
    count: int
    ends: bool

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        p = self.keyed
        return (p.y, p.x, *p.bank[:4], self.slots, self.alike, self.experts)

    @property
    def spec(self) -> DeltaSpec:
        p = self.keyed
        ranges = p.ranges
        return DeltaSpec.linear(p.y, p.x, p.A, p.B, p.ranks, *ranges, experts=self.count)

    def with_(self, **changes: object) -> Routed:
        """`changes` to this or to the tensors of `keyed`."""
        own = {k: v for k, v in changes.items() if k in Routed.__dataclass_fields__}
        others = {k: v for k, v in changes.items() if k not in own}
        return replace(self, keyed=self.keyed.with_(**others), **own)  # type: ignore[arg-type]


def routed(
    name: str, batch: str = "decode", route: str = "any", *, ends: bool = False, seed: int = 0
) -> Routed:
    count, K, R, sizes, dtype = GRID[name]
    slots, rows, total = BATCHES[batch]
    torch.manual_seed(seed)
    experts = ROUTES[route](count, total)
    if ends:
        # Negative ones are nobody's; rows behind the last group are the only ones like that.
        experts = torch.where(experts < 0, count, experts).sort().values
    owner = torch.tensor([slots[m // rows % len(slots)] for m in range(total)], dtype=torch.int32)
    known = (owner >= 0) & (experts >= 0) & (experts < count)
    keys = torch.where(known, experts * SLOTS + owner, -1).int()
    p = random_problem(
        x_shape=(total, K),
        slots=keys.tolist(),
        rows=1,
        sizes=sizes,
        max_rank=R,
        capacity=SLOTS * count,
        dtypes=(dtype,) * 3,
        seed=seed,
    )
    p = _spread_ranks(p)
    alike = torch.arange(len(sizes), dtype=torch.int32).repeat(SLOTS * count, 1)
    last = torch.bincount(experts.clamp(0, count), minlength=count + 1)[:count].cumsum(0)
    given = torch.tensor(slots, dtype=torch.int32)
    return Routed(p, alike, given, last.int() if ends else experts, rows, count, ends)


def _spread_ranks(p: Problem) -> Problem:
    """Ranks 0 … R all over the bank; NaN in the planes that are not to be read."""
    (S, R, _), G = p.B.shape, p.ranks.shape[1]
    ranks = (torch.arange(S).view(-1, 1) * 3 + 2 * torch.arange(G) + R) % (R + 1)
    generator = torch.Generator().manual_seed(S)
    A = torch.randn(p.A.shape, generator=generator).to(p.A.dtype)
    B = torch.randn(p.B.shape, generator=generator).to(p.B.dtype)
    unread = torch.arange(R) >= ranks.unsqueeze(-1)
    A.unflatten(2, (G, -1)).transpose(1, 2)[unread] = torch.nan
    B.masked_fill_(unread.all(1).unsqueeze(-1), torch.nan)
    return p.with_(A=A, B=B, ranks=ranks.int())


def run(r: Routed) -> Tensor:
    """y after the generated kernel ran on a copy of it."""
    kernel = build(r.spec)
    assert kernel is not None
    y, *others = r.tensors
    y = y.clone(memory_format=torch.preserve_format)
    lora.run_expert_delta_(y, *others, r.rows, r.count, r.ends, kernel)
    return y


@pytest.fixture(scope="module", autouse=True)
def _compiled_together() -> None:
    assert None not in build_all(routed(name).spec for name in GRID).values()


@pytest.mark.parametrize("ends", [False, True], ids=["chosen", "sorted"])
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("name", GRID)
def test_against_float64(name: str, batch: str, route: str, ends: bool) -> None:
    r = routed(name, batch, route, ends=ends)
    y = run(r)
    assert_delta(r.keyed, y)
    for got, before, owner in zip(y, r.keyed.y, r.keyed.owners(), strict=True):
        assert owner >= 0 or torch.equal(got, before)
    # The ids' width is no matter.
    wide = r.experts.long() if r.ends else r.experts.int()
    assert torch.equal(run(r.with_(experts=wide)), y)


@pytest.mark.parametrize("batch", ["decode", "one row", "prefill"])
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_siblings_that_share_an_a(batch: str, dtype: torch.dtype, threads: int) -> None:
    """`alike` saves work and changes no bit: the A that is not read may hold anything."""
    name = "gate and up" if dtype == FP32 else "gate and up bf16"
    r = routed(name, batch)
    p, R, K = r.keyed, r.keyed.B.shape[1], r.keyed.x.shape[-1]
    A, B = torch.randn(p.A.shape).to(dtype), torch.randn(p.B.shape).to(dtype)
    ranks, scales, alike = p.ranks.clone(), p.scales.clone(), r.alike.clone()
    shared = [owner for owner in p.owners()[::2] if owner >= 0]
    ranks[shared], scales[shared, 1] = R - 1, scales[shared, 0]
    A[shared, :, K:] = A[shared, :, :K]
    r = r.with_(A=A, B=B, ranks=ranks, scales=scales)
    want = run(r)
    assert_delta(r.keyed, want)
    hidden = A.clone()
    hidden[shared, :, K:] = torch.nan
    alike[shared, 1] = 0
    assert torch.equal(run(r.with_(A=hidden, alike=alike)), want)


BAD = {
    "a slot is outside the bank": lambda r: {"slots": r.slots + 1},
    "alike \\(int32\\) is not \\(slots": lambda r: {"alike": r.alike[1:]},
}


@pytest.mark.parametrize("message", list(BAD))
def test_bad_arguments(message: str) -> None:
    """Refused before y is touched, and no tensor is kept."""
    r = routed("gate and up")
    kernel = build(r.spec)
    r = r.with_(**BAD[message](r))
    before, counts = r.keyed.y.clone(), [t._use_count() for t in r.tensors]
    with pytest.raises(RuntimeError, match=message):
        lora.run_expert_delta_(*r.tensors, r.rows, r.count, r.ends, kernel)
    assert torch.equal(r.keyed.y, before)
    assert [t._use_count() for t in r.tensors] == counts


@pytest.mark.parametrize("ends", [False, True], ids=["chosen", "sorted"])
def test_opcheck(ends: bool) -> None:
    r = routed("gate and up", ends=ends)
    op, arguments = delta_call(r.spec, *r.tensors, rows=r.rows, ends=ends)
    assert torch.library.opcheck(op, arguments)
