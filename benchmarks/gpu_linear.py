"""One packed linear with LoRA: its arms beside the vendor's GEMM, and whether they are right.

    y = x Wᵀ + Σ_j (x A[s, j]ᵀ) B[s, j]     siblings j share x; s is the slot of the row

An arm is made in two steps: `make(case, device)` once a case, which builds its kernels, and what it
returns once for each copy of the tensors, which gives the call that is timed. Only the second may
read the copy; whatever it needs beside (a weight with room behind its columns) it makes there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import gpu_protocol
import torch
from gpu_job import Context, Rows
from torch import Tensor
from torch.nn.functional import linear, pad
from triton_variants import packed_delta
from tune import LinearProblem

from lorafx.integrations.vllm.launches import launches
from lorafx.kernels.cost.chips import chip_of
from lorafx.kernels.cost.roofline import FUSED, Work, estimate
from lorafx.kernels.triton.build import CONCAT, TritonSpec, build, load_tuned, plan_of
from lorafx.kernels.triton.ops import columns_of
from lorafx.kernels.triton.tiles import architecture_of

#: The packed linears of a layer of Llama-3-8B: K, and the columns of siblings.
LAYERS = {
    "q/k/v": (4096, (4096, 1024, 1024)),
    "o": (4096, (4096,)),
    "gate/up": (4096, (14336, 14336)),
    "down": (14336, (4096,)),
}
#: Rows, distinct adapters, rank. In prefill the rows of an adapter lie behind one another.
MIXES = {"prefill": (8192, 8, 16), "decode": (64, 8, 16)}
#: What a self-check runs in their place.
TINY_LAYERS = {"tiny": (64, (64, 32, 32))}
TINY_MIXES = {"prefill": (24, 4, 8), "decode": (5, 3, 8)}
DTYPE, SLOTS = torch.bfloat16, 32
#: Copies in prefill: the activations alone flush the cache between calls, and FLOPs decide.
PREFILL_COPIES = 4
#: Requests of a batch of prompts, each with M / REQUESTS rows.
REQUESTS = 8
#: Largest error against float64, in units of the largest value, that a 16-bit result may have.
TOLERANCE = 2e-2


@dataclass(frozen=True)
class Case:
    """One linear and one batch. Time must grow with `distinct` adapters, not with SLOTS."""

    name: str
    in_features: int
    sizes: tuple[int, ...]
    rows: int
    distinct: int
    rank: int
    phase: str

    @property
    def label(self) -> str:
        shape = f"{self.name} ({self.in_features}, {sum(self.sizes)})"
        return f"{shape} M={self.rows} D={self.distinct} r={self.rank}"

    def spec(self, strategy: str) -> TritonSpec:
        """What kernels of `strategy` are generated for."""
        delta = packed_delta(self.in_features, self.sizes, self.rank, DTYPE)
        return TritonSpec(delta, DTYPE if strategy in (*FUSED, CONCAT) else None)

    def work(self, device: torch.device) -> Work:
        """The case as the cost model takes it."""
        shape = (self.in_features, self.sizes, self.rows, self.distinct, self.rank)
        return Work(*shape, DTYPE, chip_of(device))

    def copy(self, device: torch.device) -> LinearProblem:
        """Tensors of one of the copies that an arm rotates over."""
        spread = {"slots": SLOTS, "distinct": self.distinct, "turns": self.phase == "decode"}
        return LinearProblem.random(self.spec("epilogue"), self.rows, device, **spread)

    @property
    def nbytes(self) -> int:
        """Bytes of weight and bank of one copy."""
        K, N, G = self.in_features, sum(self.sizes), len(self.sizes)
        return (K * N + SLOTS * self.rank * (G * K + N)) * DTYPE.itemsize


def cases(phase: str, *, tiny: bool = False) -> list[Case]:
    layers, mixes = (TINY_LAYERS, TINY_MIXES) if tiny else (LAYERS, MIXES)
    return [Case(name, *sizes, *mixes[phase], phase) for name, sizes in layers.items()]


# --- arms ---

ArmOfCopy = Callable[[LinearProblem], Callable[[], Tensor]]


@dataclass(frozen=True)
class Arm:
    """A way to compute one packed linear with LoRA, which is compared with the vendor's GEMM.

    Attributes:
        plain: whether it computes the base alone.
    """

    name: str
    phases: tuple[str, ...]
    make: Callable[[Case, torch.device], ArmOfCopy]
    plain: bool = False


def base_of(copy: LinearProblem) -> Tensor:
    """The vendor GEMM alone."""
    return linear(copy.x, copy.weight)


def chosen(case: Case, device: torch.device) -> str:
    """The strategy that `plan` would take for the case."""
    return next(iter(estimate(case.work(device))))


def strategy(case: Case, device: torch.device, *, name: str) -> ArmOfCopy:
    """One of lorafx's strategies."""
    if name == CONCAT:
        return concat(case, device)
    kernel = build(case.spec(name), name, rows_hint=case.rows, device=device)
    assert kernel is not None

    def call(copy: LinearProblem) -> Tensor:
        return (copy if name in FUSED else replace(copy, y=base_of(copy))).run(name, kernel)

    return lambda copy: partial(call, copy)


def concat(case: Case, device: torch.device) -> ArmOfCopy:
    """x and W made longer, as in a compiled model: there what computes x writes it into x' itself,
    so x' is filled beforehand; W' = [W | B] is copied together at every call."""
    specs = [replace(case.spec(CONCAT), by_request=alike) for alike in (False, True)]
    kernels = [build(spec, CONCAT, rows_hint=case.rows, device=device) for spec in specs]

    def make(copy: LinearProblem) -> Callable[[], Tensor]:
        *bank, owners = copy.bank
        slots, rows = _requests(owners)
        blocks = min(slots.shape[0], copy.bank[1].shape[0])  # one a request, or a slot if fewer
        kernel = kernels[slots.shape[0] == blocks]
        more = (0, columns_of(plan_of(kernel).spec, blocks))
        x, weight, y = pad(copy.x, more), pad(copy.weight, more), torch.empty_like(copy.y)
        inside = weight[:, : case.in_features]

        def call() -> Tensor:
            inside.copy_(copy.weight)
            torch.ops.lorafx.triton_concat_(x, weight, *bank, slots, rows, kernel)
            return torch.mm(x, weight.T, out=y)

        return call

    return make


def _requests(owners: Tensor) -> tuple[Tensor, int]:
    """The slots of REQUESTS requests and the rows of each, where rows are alike so; else a request
    a row."""
    if owners.shape[0] % REQUESTS == 0:
        each = owners.view(REQUESTS, -1)
        if bool((each == each[:, :1]).all()):
            return each[:, 0].contiguous(), each.shape[1]
    return owners, 1


def planned(case: Case, device: torch.device) -> ArmOfCopy:
    """The strategy that `plan` takes, with tuned tiles where the cache has some."""
    load_tuned(architecture_of(device))
    return strategy(case, device, name=chosen(case, device))


def nobody(case: Case, device: torch.device) -> ArmOfCopy:
    """What `plan` takes, with only base rows in the batch."""
    make = planned(case, device)
    return lambda copy: make(owned(copy, torch.full_like(copy.bank[-1], -1)))


def owned(copy: LinearProblem, owners: Tensor) -> LinearProblem:
    return replace(copy, bank=(*copy.bank[:-1], owners))


def in_vllm(case: Case, device: torch.device) -> ArmOfCopy:
    """What layers of vLLM call in CUDA graphs: kernels by the rows of a step, slots of its rows in
    a table for longer steps."""
    kernels = launches(case.spec("segments").delta, device)
    assert kernels is not None

    def make(copy: LinearProblem) -> Callable[[], Tensor]:
        table = torch.full((2 * case.rows,), -1, dtype=torch.int32, device=device)
        table[: case.rows] = copy.bank[-1]

        def call() -> Tensor:
            y = base_of(copy)
            torch.ops.lorafx.launch_delta_(y, copy.x, *copy.bank[:-1], table, *kernels)
            return y

        return call

    return make


BOTH, PREFILL, DECODE = ("prefill", "decode"), ("prefill",), ("decode",)
#: The most promising first.
ARMS = (
    Arm("plan", BOTH, planned),
    *(Arm(name, PREFILL, partial(strategy, name=name)) for name in (CONCAT, "segments")),
    Arm("split", DECODE, partial(strategy, name="split")),
    Arm("epilogue", BOTH, partial(strategy, name="epilogue")),
    Arm("inside vLLM", BOTH, in_vllm),
    Arm("plan, no adapter", BOTH, nobody, plain=True),
    Arm("gemv", DECODE, partial(strategy, name="gemv")),
)


# --- right, and fast ---


def exact(case: Case, copy: LinearProblem) -> Tensor:
    """What an arm should give, float64 (M, ΣN)."""
    y = copy.x.double() @ copy.weight.double().T
    A, B, _, _, owners = copy.bank
    for slot in set(owners.tolist()) - {-1}:
        mine, parts = owners == slot, A[slot].double().split(case.in_features, 1)
        x, ends = copy.x[mine].double(), B[slot].double().split(list(case.sizes), 1)
        y[mine] += torch.cat([x @ a.T @ b for a, b in zip(parts, ends, strict=True)], 1)
    return y


def check(case: Case, arm: Arm, copy: LinearProblem, make: ArmOfCopy) -> float:
    """Largest error of an arm against float64, over the largest value; one row in five has no
    adapter.

    Raises:
        RuntimeError: the arm is wrong, or gives other bits when it runs again.
    """
    owners = copy.bank[-1].clone()
    owners[slice(None) if arm.plain else slice(4, None, 5)] = -1
    copy = owned(copy, owners)
    want, call = exact(case, copy), make(copy)
    got = call().clone()
    error = float((got.double() - want).abs().max() / want.abs().max())
    if not error < TOLERANCE:
        raise RuntimeError(f"{case.label}: {arm.name} is off by {error:.2e} of the largest")
    if not torch.equal(got, call()):
        raise RuntimeError(f"{case.label}: {arm.name} gives other bits when it runs again")
    return error


def measure(case: Case, arm: Arm, meter: gpu_protocol.Meter) -> list[dict[str, Any]]:
    """Rows of results of an arm over the vendor's GEMM, A/A first."""
    make, prompts = arm.make(case, meter.device), meter.measures and case.phase == "prefill"
    count = PREFILL_COPIES if prompts else meter.copies(case.nbytes)
    copies = [case.copy(meter.device) for _ in range(count)]
    error, counted = check(case, arm, copies[0], make), meter.launches(make(copies[0]))
    timed = meter.arm([make(copy) for copy in copies])
    base = meter.arm([partial(base_of, copy) for copy in copies])
    rows = meter.compare(case.label, base, {arm.name: timed})
    work, plan = case.work(meter.device), chosen(case, meter.device)
    rows[-1] |= {"floor": work.floor() / work.base(), "copies": count, "plan": plan}
    rows[-1] |= {"error": error, "launches": len(counted)}
    return rows


def compare_arms(context: Context, *, phase: str) -> None:
    """Job: every arm of a phase over the vendor's GEMM, on each packed linear."""
    meter = gpu_protocol.Meter(context.device)

    def summary(rows: Rows) -> str:
        """The ratios, arm by arm: "plan: q/k/v 1.02, o 1.03"."""
        found: dict[str, list[str]] = {}
        for row in (row for row in rows if row["arm"] != "A/A"):
            ratio = f"{row['case'].split()[0]} {row['median']:.3f}"
            found.setdefault(row["arm"], []).append(ratio)
        return "; ".join(f"{arm}: {', '.join(ratios)}" for arm, ratios in found.items())

    own = {
        f"{arm.name}: {case.label}": (case, arm)
        for arm in ARMS
        for case in cases(phase, tiny=context.tiny)
        if phase in arm.phases
    }
    context.measure(own, lambda case_and_arm: measure(*case_and_arm, meter), summary)
