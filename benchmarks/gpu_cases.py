"""Workloads of gpu_layers.py: which linears, which batches, and their tensors.

y = x Wᵀ + Σ_j 0.5 (x A[s, j]ᵀ) B[s, j]     siblings j share x; s is the slot of the row
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import peers
import torch
from torch import Tensor
from tune import concat_linear

import lorafx.kernels.triton.ops  # noqa: F401  registers them
from lorafx.kernels.cost.roofline import FUSED, Work, chip_of
from lorafx.kernels.ops.delta_spec import DeltaSpec
from lorafx.kernels.ops.op_library import BankArgs
from lorafx.kernels.triton.build import CONCAT, TritonSpec

#: (in_features, sizes of the siblings that share x) of the packed linears of a decoder layer
LAYERS: Mapping[str, Mapping[str, tuple[int, tuple[int, ...]]]] = {
    "llama-8b": {
        "q/k/v": (4096, (4096, 1024, 1024)),
        "o": (4096, (4096,)),
        "gate/up": (4096, (14336, 14336)),
        "down": (14336, (4096,)),
    },
    "llama-70b": {
        "q/k/v": (8192, (8192, 1024, 1024)),
        "o": (8192, (8192,)),
        "gate/up": (8192, (28672, 28672)),
        "down": (28672, (8192,)),
    },
    "qwen2.5-7b": {
        "q/k/v": (3584, (3584, 512, 512)),
        "o": (3584, (3584,)),
        "gate/up": (3584, (18944, 18944)),
        "down": (18944, (3584,)),
    },
}
#: (rows M, distinct adapters D, rank), the most telling first: a budget of minutes cuts off the end
MIXES = (
    *((64, 8, 16), (1, 1, 16), (32, 8, 16), (8192, 8, 16), (8, 8, 16), (64, 32, 16), (64, 0, 16)),
    *((64, 8, 64), (8192, 1, 64), (16, 1, 16), (4, 4, 16), (128, 8, 16), (64, 64, 16)),
)
SLOTS = 32  # that the bank holds: time must grow with D, not with these
SCALE = 0.5  # of every adapter
DECODE_ROWS = 256  # up to so many rows a batch is decode


@dataclass(frozen=True)
class Case:
    """One linear and one batch. `distinct` 0 is a batch of base rows; `prompts` are rows of an
    adapter behind one another, as in prefill, though there are few."""

    model: str
    layer: str
    in_features: int
    sizes: tuple[int, ...]
    rows: int
    distinct: int
    rank: int
    slots: int = SLOTS
    dtype: torch.dtype = torch.bfloat16
    prompts: bool = False

    @property
    def label(self) -> str:
        shape = f"{self.model} {self.layer} ({self.in_features}, {sum(self.sizes)})"
        return f"{shape} M={self.rows} D={self.distinct} r={self.rank}"

    @property
    def decode(self) -> bool:
        return self.rows <= DECODE_ROWS and not self.prompts

    def spec(self, strategy: str) -> TritonSpec:
        """What kernels of `strategy` are generated for."""
        count = len(self.sizes)
        delta = DeltaSpec(
            x_dtype=self.dtype,
            bank_dtype=self.dtype,
            y_dtype=self.dtype,
            in_features=self.in_features,
            max_rank=self.rank,
            group=count,
            columns=sum(self.sizes),
            siblings=tuple(range(count)),
            offsets=tuple(sum(self.sizes[:j]) for j in range(count)),
            sizes=self.sizes,
        )
        return TritonSpec(delta, self.dtype if strategy in (*FUSED, CONCAT) else None)

    def work(self, device: torch.device) -> Work:
        """The case as the cost model takes it."""
        shape = (self.in_features, self.sizes, self.rows, max(self.distinct, 1), self.rank)
        return Work(*shape, self.dtype, chip_of(device))

    def floor(self, device: torch.device) -> float:
        """Modelled least time over the base's; 1 for a batch without adapters."""
        work = self.work(device)
        return work.floor() / work.base() if self.distinct else 1.0

    @property
    def nbytes(self) -> int:
        """Bytes of weight and bank of one copy."""
        K, N, G = self.in_features, sum(self.sizes), len(self.sizes)
        return (K * N + self.slots * self.rank * (G * K + N)) * self.dtype.itemsize


def cases(model: str) -> Iterator[Case]:
    """Every mix of every layer of `model`, mixes in the order of MIXES."""
    for rows, distinct, rank in MIXES:
        for layer, (in_features, sizes) in LAYERS[model].items():
            slots = max(SLOTS, distinct)
            yield Case(model, layer, in_features, sizes, rows, distinct, rank, slots)


#: What --self-check runs: tiny, in float16, which the interpreter gets right in peers' kernels.
TINY = tuple(
    Case("tiny", layer, K, sizes, rows, distinct, 8, slots=4, dtype=torch.float16)
    for layer, K, sizes in (("o", 48, (64,)), ("q/k/v", 64, (64, 32, 32)))
    for rows, distinct in ((1, 1), (5, 3), (20, 4))
)


@dataclass(frozen=True)
class Copy:
    """Tensors of one of the copies that an arm rotates over.

    Attributes:
        x: (M, K); weight: (ΣN, K); A: (S, r, G·K); B: (S, r, ΣN).
        owners: (M,) int32, the slot of each row; −1 everywhere where D is 0.
    """

    case: Case
    x: Tensor
    weight: Tensor
    A: Tensor
    B: Tensor
    ranks: Tensor
    scales: Tensor
    owners: Tensor

    @classmethod
    def random(cls, case: Case, device: torch.device) -> Copy:
        K, N, r = case.in_features, sum(case.sizes), case.rank
        S, G = case.slots, len(case.sizes)

        def normal(*shape: int, scale: float = 1.0) -> Tensor:
            return (torch.randn(shape, device=device) * scale).to(case.dtype)

        return cls(
            case,
            normal(case.rows, K),
            normal(N, K, scale=K**-0.5),
            normal(S, r, G * K, scale=K**-0.5),
            normal(S, r, N, scale=r**-0.5),
            torch.full((S, G), r, dtype=torch.int32, device=device),
            torch.full((S, G), SCALE, device=device),
            owners_of(case, device),
        )

    def base(self) -> Tensor:
        """The vendor GEMM alone."""
        return torch.nn.functional.linear(self.x, self.weight)

    def lora(self, strategy: str, kernel: int, owners: Tensor | None = None) -> Tensor:
        """Base and delta by one of lorafx's strategies, a request a row."""
        bank = (self.A, self.B, self.ranks, self.scales)
        slots = self.owners if owners is None else owners
        op = torch.ops.lorafx
        if strategy in FUSED:
            return op.triton_linear(self.x, self.weight, None, *bank, slots, 1, kernel)
        if strategy == CONCAT:
            return concat_linear(self.x, self.weight, None, BankArgs(*bank, slots), 1, kernel)
        y = self.base()
        op.triton_delta_(y, self.x, *bank, slots, 1, kernel)
        return y

    def exact(self) -> Tensor:
        """What every arm should give, float64 (M, ΣN)."""
        y = self.x.double() @ self.weight.double().T
        sizes, K = list(self.case.sizes), self.case.in_features
        for slot in self.owners.unique().tolist():
            if slot < 0:
                continue
            mine = self.owners == slot
            x, each = self.x[mine].double(), self.A[slot].double().split(K, 1)
            parts = self.B[slot].double().split(sizes, 1)
            delta = [x @ a.T @ b for a, b in zip(each, parts, strict=True)]
            y[mine] += SCALE * torch.cat(delta, 1)
        return y

    def peer(self) -> peers.Layer:
        """The same layer as the peers hold it: a stack a sibling, B (S, N, r)."""
        A = [part.contiguous() for part in self.A.split(self.case.in_features, 2)]
        B = [part.mT.contiguous() for part in self.B.split(list(self.case.sizes), 2)]
        return peers.Layer(self.x, self.weight, A, B, self.owners, SCALE)


def owners_of(case: Case, device: torch.device) -> Tensor:
    """(M,) int32: in decode the adapters take turns, in prefill each has a run of rows."""
    if not case.distinct:
        return torch.full((case.rows,), -1, dtype=torch.int32, device=device)
    rows = torch.arange(case.rows, device=device)
    turn = rows % case.distinct if case.decode else rows * case.distinct // case.rows
    return (turn * (case.slots // case.distinct)).to(torch.int32)  # spread over the bank
