"""Products with routed experts by themselves: lorafx's kernels beside the grouped product alone.

    python benchmarks/gpu_queue.py --only "expert kernels"      (a job for each product and phase)
    python benchmarks/gpu_queue.py --only "vllm experts"        (the same beside vLLM's fused op)

A layer of Qwen3-30B-A3B: 128 experts, 8 of them a token, hidden size 2048, 768 between, bf16, LoRA
of rank 16 on both products. Decode is 64 tokens of as many requests, prefill 8192 of 8. Each token
goes to 8 experts at random.

    gate/up   base: torch's grouped product of rows sorted by expert, which transformers calls
              "grouped": the same with the deltas inside
    down      base: silu(gate) · up by Inductor, then the grouped product
              "grouped": the same with the deltas inside
    vLLM      the base, and its deltas added in place by vLLM's op (peer_experts.py)

Before anything is timed, rows are compared with float64. A layer's experts are 20 times an H200's
cache, so one copy of the weights is read from memory at every call.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import gpu_protocol
import peer_experts
import protocol
import torch
import torch.nn.functional as F
from gpu_job import Context
from torch import Tensor

import lorafx.kernels.triton.ops  # noqa: F401  registers the op
from lorafx.kernels.ops.delta_spec import DeltaSpec
from lorafx.kernels.triton.build import TritonSpec, build

#: experts, experts a token, hidden size, size between, rank
REAL, TINY = (128, 8, 2048, 768, 16), (8, 2, 64, 32, 4)
#: tokens and requests
TOKENS = {"decode": (64, 64), "prefill": (8192, 8)}
MIXES = (8, 1, 0)
CAPACITY = 8
CHECKED = 48  # rows that are compared with float64
OVER = ", over lorafx "
#: Largest error over what rounding the exact result takes.
ROUNDING = 4.0


def _by_slot(factors: Tensor, experts: int) -> Tensor:
    """(E·S, …) as (S, E, …)."""
    return factors.unflatten(0, (experts, -1)).transpose(0, 1).contiguous()


def gated(y: Tensor) -> Tensor:
    gate, up = y.chunk(2, -1)
    return F.silu(gate) * up


@dataclass(frozen=True)
class Product:
    """One product's arguments; rows are sorted by expert.

    Attributes:
        y: (M, 2K), what x is computed from; None where x is given.
        x: (M, K); weight: (E, N, K); offs: (E,), where the rows of each expert end.
        experts, slots: (M,), of each row; A (E·S, R, G·K), B (E·S, R, N).
        order: (M,), where the row would be were rows sorted by token; top: rows of a token.
    """

    y: Tensor | None
    x: Tensor
    weight: Tensor
    offs: Tensor
    experts: Tensor
    slots: Tensor
    bank: tuple[Tensor, Tensor, Tensor, Tensor]
    sizes: tuple[int, ...]
    order: Tensor
    top: int

    @classmethod
    def random(
        cls, name: str, phase: str, distinct: int, device: torch.device, *, tiny: bool
    ) -> Product:
        E, top, hidden, inner, rank = TINY if tiny else REAL
        tokens, requests = (6, 3) if tiny else TOKENS[phase]
        dtype = torch.float32 if tiny else torch.bfloat16
        generator = torch.Generator(device).manual_seed(0)

        def normal(*shape: int, scale: float = 1.0) -> Tensor:
            return (torch.randn(shape, device=device, generator=generator) * scale).to(dtype)

        chosen = torch.rand(tokens, E, device=device, generator=generator).argsort(1)[:, :top]
        experts, order = chosen.flatten().sort(stable=True)
        request = order // top * requests // tokens
        slots = request % distinct if distinct else torch.full_like(request, -1)
        offs = torch.bincount(experts, minlength=E).cumsum(0).to(torch.int32)
        K, sizes = (hidden, (inner, inner)) if name == "gate/up" else (inner, (hidden,))
        M, N, G, S = len(experts), sum(sizes), len(sizes), CAPACITY * E
        y = normal(M, 2 * K) if name == "down" else None
        bank = (
            normal(S, rank, G * K, scale=K**-0.5),
            normal(S, rank, N, scale=rank**-0.5),
            torch.full((S, G), rank, dtype=torch.int32, device=device),
            torch.ones((S, G), device=device),
        )
        x = normal(tokens, K)[order // top] if y is None else gated(y)
        weight = normal(E, N, K, scale=K**-0.5)
        slots = slots.to(torch.int32)
        return cls(y, x, weight, offs, experts, slots, bank, sizes, order, top)

    def kernel(self, strategy: str) -> int:
        """The id of the kernels, planned for the rows that an expert has on average."""
        empty = self.x.new_empty((1, sum(self.sizes)))
        offsets = [sum(self.sizes[:j]) for j in range(len(self.sizes))]
        ranges = (list(range(len(self.sizes))), offsets, list(self.sizes))
        delta = DeltaSpec.linear(empty, self.x, *self.bank[:3], *ranges)
        E, rows = len(self.offs), -(-len(self.experts) // len(self.offs))
        spec = TritonSpec(delta, self.x.dtype, experts=E)
        kernel = build(spec, strategy, rows_hint=rows, device=self.x.device)
        assert kernel is not None
        return kernel

    def lorafx(self, strategy: str) -> Callable[[], Tensor]:
        """The product with its deltas; x is computed as the base has it."""
        kernel, op = self.kernel(strategy), torch.ops.lorafx.triton_experts
        tail = (self.weight, self.offs, *self.bank, self.slots, 1, kernel)
        before = self.before()
        return lambda: op(before(), *tail)

    def before(self) -> Callable[[], Tensor]:
        """What gives x."""
        if self.y is None:
            return lambda: self.x
        compute = torch.compile(gated, dynamic=False) if self.x.is_cuda else gated
        return lambda: compute(self.y)

    def base(self) -> Callable[[], Tensor]:
        before, weight = self.before(), self.weight.transpose(-1, -2)
        return lambda: torch._grouped_mm(before(), weight, offs=self.offs)

    def peer(self) -> peer_experts.Layer:
        """The adapters as vLLM holds them; scales are 1."""
        A, B, _, _ = self.bank
        E, K, place = len(self.offs), self.x.shape[1], self.order.argsort()
        return peer_experts.Layer(
            self.experts[place].view(-1, self.top),
            self.slots[place][:: self.top].contiguous(),
            [_by_slot(part, E) for part in A.split(K, 2)],
            [_by_slot(part.mT, E) for part in B.split(list(self.sizes), 2)],
            by_choice=self.y is not None,
        )

    def with_peer(self, add: peer_experts.Add, *, arrange: bool) -> Callable[[], Tensor]:
        """The base with vLLM's deltas, whose rows stand in the order of tokens.

        `arrange` brings rows into that order and back, so that the result is right. What is timed
        leaves that out: the op reads and writes the same tensors, with other tokens' rows in them.
        """
        before, weight, place = self.before(), self.weight.transpose(-1, -2), self.order.argsort()
        tokens = self.x[place][:: self.top].contiguous() if self.y is None else None

        def call() -> Tensor:
            x = before()
            y = torch._grouped_mm(x, weight, offs=self.offs)
            if arrange:
                x, y = x[place], y[place]
            add(x if tokens is None else tokens, y)
            return y[self.order] if arrange else y

        return call

    def error(self, got: Tensor) -> float:
        """The largest of some rows, over that of rounding what float64 has."""
        step = max(len(self.x) // CHECKED, 1)
        A, B, ranks, scales = self.bank
        K = self.x.shape[1]
        worst = allowed = 0.0
        for row in range(0, len(self.x), step):
            x, expert, slot = self.x[row].double(), int(self.experts[row]), int(self.slots[row])
            exact = self.weight[expert].double() @ x
            if slot >= 0:
                key, start = expert * (len(ranks) // len(self.offs)) + slot, 0
                for j, size in enumerate(self.sizes):
                    v = scales[key, j] * (A[key, :, j * K : (j + 1) * K].double() @ x)
                    exact[start : start + size] += v @ B[key, :, start : start + size].double()
                    start += size
            worst = max(worst, float((got[row].double() - exact).abs().max()))
            rounding = (exact.to(got.dtype).double() - exact).abs().max()
            allowed = max(allowed, float(rounding), 1e-5 * float(exact.abs().max()))
        return worst / allowed


def run_product(context: Context, *, product: str, phase: str) -> None:
    """Job: one product, mix after mix."""
    meter = gpu_protocol.Meter(context.device)
    keys = {f"{product}, {phase}, D={distinct}": distinct for distinct in MIXES}
    for key in context.order(list(keys)):
        with context.case(key):
            context.add(key, measure(context, meter, product, phase, keys[key], key))
    done = [row for row in context.part.rows if row["arm"] != "A/A"]
    context.summarise(", ".join(f"{row['arm']} {row['median']:.3f}" for row in done))


def run_peer(context: Context, *, product: str, phase: str) -> None:
    """Job: one product by lorafx and by vLLM's fused op, and vLLM over lorafx."""
    make = peer_experts.find()
    if isinstance(make, str):
        raise FileNotFoundError(f"{make}, or vllm.zip in the folder of --peers")
    meter = gpu_protocol.Meter(context.device)
    keys = {f"{product}, {phase}, D={distinct}": distinct for distinct in MIXES if distinct}
    for key in context.order(list(keys)):
        with context.case(key):
            context.add(key, measure(context, meter, product, phase, keys[key], key, make))
    over = [
        f"{row['key']} {row['arm']} {row['median']:.2f}"
        for row in context.part.rows
        if OVER in row["case"] and row["arm"] != "A/A"
    ]
    context.summarise(f"over lorafx: {', '.join(over)}")


def measure(
    context: Context,
    meter: gpu_protocol.Meter,
    name: str,
    phase: str,
    distinct: int,
    key: str,
    make: peer_experts.Make | None = None,
) -> list[dict[str, Any]]:
    """Rows of results of one mix; with `make` those of vLLM's op too, a block size an arm.

    Raises:
        RuntimeError: a row is off by more than rounding explains.
    """
    problem = Product.random(name, phase, distinct, context.device, tiny=context.tiny)
    calls = {f"grouped D={distinct}": problem.lorafx("grouped")}
    errors = {arm: problem.error(call()) for arm, call in calls.items()}
    first, theirs = f"grouped D={distinct}", {}
    if make is not None:
        layer = problem.peer()
        for block in peer_experts.BLOCKS[: 1 if context.tiny else None]:
            add, arm = make(layer, block), f"vLLM, blocks of {block}"
            errors[arm] = problem.error(problem.with_peer(add, arrange=True)())
            theirs[arm] = problem.with_peer(add, arrange=False)
    if not max(errors.values()) < ROUNDING:
        raise RuntimeError(f"{key}: errors over rounding {errors}")
    base = meter.arm([problem.base()])
    arms = {arm: meter.arm([call]) for arm, call in (calls | theirs).items()}
    start, case = gpu_protocol.clocks(), f"{key}: {len(problem.x)} rows"
    results = [(case, ratio) for ratio in meter.compare(base, arms)]
    if theirs:
        ratios = meter.compare(arms[first], {arm: arms[arm] for arm in theirs})
        results += [(f"{case}{OVER}{first}", ratio) for ratio in ratios]
    rows = []
    for case, ratio in results:
        print(f"  {case} {ratio.arm:20s} {ratio}", flush=True)
        row = protocol.as_row(case, ratio) | {"error_over_rounding": errors.get(ratio.arm)}
        row |= {"notes": peer_experts.NOTES} if ratio.arm in theirs else {}
        rows.append(row | {"clocks before": start, "clocks after": gpu_protocol.clocks()})
    return rows
