"""Random arguments of one product with routed experts, for the tuner's clock.

rows of each expert, sorted by expert, the slots of 8 adapters in turn: each row another key
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

import lorafx.kernels.triton.triton_expert_ops  # noqa: F401  registers the op
from lorafx.kernels.triton.triton_source import TritonSpec


@dataclass(frozen=True)
class ExpertProblem:
    """Arguments of `lorafx::triton_experts`: [x], or what x is computed from."""

    x: Tensor
    inputs: tuple[Tensor, ...]
    weight: Tensor
    offs: Tensor
    bank: tuple[Tensor, ...]

    @classmethod
    def random(
        cls, spec: TritonSpec, rows: int, device: torch.device, slots: int = 8
    ) -> ExpertProblem:
        """`rows` rows of each expert; values of about 1 in y."""
        d, E, f = spec.delta, spec.experts, spec.activation
        K, N, R, G, M = d.in_features, spec.out_features, d.max_rank, d.group, rows * E

        def normal(*shape: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
            return (torch.randn(shape, device=device) * scale).to(dtype)

        experts = torch.arange(E, device=device).repeat_interleave(rows)
        inputs: list[Tensor] = []
        leaves, loads_of = ((), ()) if f is None else (f.leaves, f.loads)
        for index, leaf in enumerate(leaves):
            loads = [load for load in loads_of if load.leaf == index]
            width = max(load.start + load.step * (K - 1) for load in loads) + 1
            inputs.append(normal(E if leaf.gathered else M, width, dtype=leaf.dtype))
            inputs += [experts] if leaf.gathered else []
        shape = (E, K, N) if spec.transposed else (E, N, K)
        weight = normal(*shape, dtype=spec.weight_dtype or d.x_dtype, scale=K**-0.5)
        A = normal(slots * E, R, G * K, dtype=d.bank_dtype, scale=K**-0.5)
        B = normal(slots * E, R, d.columns, dtype=d.bank_dtype, scale=R**-0.5)
        ranks = torch.full((slots * E, G), R, dtype=torch.int32, device=device)
        scales = torch.ones((slots * E, G), device=device)
        owners = torch.arange(M, dtype=torch.int32, device=device) % slots
        offs = torch.arange(1, E + 1, dtype=torch.int32, device=device) * rows
        x = normal(M, K, dtype=d.x_dtype)
        return cls(x, tuple(inputs), weight, offs, (A, B, ranks, scales, owners))

    def run(self, strategy: str, kernel: int) -> Tensor:
        """The node's result by `kernel`, one row a request."""
        inputs = list(self.inputs) if strategy == "activated" else [self.x]
        return torch.ops.lorafx.triton_experts(
            inputs, self.weight, self.offs, *self.bank, 1, kernel
        )
