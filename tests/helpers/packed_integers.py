"""Linears in the layouts that GPTQ and AWQ checkpoints have, with the kernel as an opaque operator.

    GPTQ   W[n, k] = (q[k, n] − z[g(k), n] − 1) · s[g(k), n]     q packed along k, 8 in an int32
    AWQ    W[n, k] = (q[k, n] − z[g(k), n]) · s[g(k), n]         q packed along n, in the order
                                                                 0 2 4 6 1 3 5 7

qweight, qzeros int32, scales (K / group, N), g_idx (K,): the group of each input, not sorted under
GPTQ's activation order. Neither class is an nn.Linear or has an attribute `weight`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

BITS, EIGHT = 4, 8
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def pack(values: Tensor, dim: int, order: tuple[int, ...] = tuple(range(EIGHT))) -> Tensor:
    """Integers 0 … 15 along `dim`, eight in an int32, the i-th of them in nibble order.index(i)."""
    split = values.to(torch.int64).movedim(dim, -1).unflatten(-1, (-1, EIGHT))
    packed = sum(split[..., source] << (BITS * place) for place, source in enumerate(order))
    assert isinstance(packed, Tensor)
    signed = torch.where(packed >= 1 << 31, packed - (1 << 32), packed)
    return signed.to(torch.int32).movedim(-1, dim).contiguous()


def unpack(packed: Tensor, dim: int, order: tuple[int, ...] = tuple(range(EIGHT))) -> Tensor:
    """The inverse of `pack`."""
    nibbles = [(packed.movedim(dim, -1) >> (BITS * order.index(i))) & 15 for i in range(EIGHT)]
    return torch.stack(nibbles, -1).flatten(-2).movedim(-1, dim)


def _weight(qweight: Tensor, qzeros: Tensor, scales: Tensor, g_idx: Tensor, awq: bool) -> Tensor:
    order = ORDER if awq else tuple(range(EIGHT))
    numbers = unpack(qweight, 1 if awq else 0, order)
    zeros = unpack(qzeros, 1, order) + (0 if awq else 1)
    return ((numbers - zeros[g_idx]) * scales[g_idx].float()).T


@torch.library.custom_op("lorafx_tests::packed_gemm", mutates_args=())
def packed_gemm(
    x: Tensor, qweight: Tensor, qzeros: Tensor, scales: Tensor, g_idx: Tensor, awq: bool
) -> Tensor:
    """x (…, K) → (…, N): the library's kernel, of which nothing is known but its shapes."""
    return x @ _weight(qweight, qzeros, scales, g_idx, awq).to(x.dtype).T


@packed_gemm.register_fake
def _(x, qweight, qzeros, scales, g_idx, awq):
    return x.new_empty((*x.shape[:-1], scales.shape[1]))


class PackedLinear(nn.Module):
    """Made from a plain linear, quantised by rounding."""

    awq = False

    def __init__(self, linear: nn.Linear, group: int = 32) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.register_buffer("g_idx", self.groups(group))
        self.register_buffer("scales", torch.ones(self.in_features // group, self.out_features))
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach().clone())
        self.store(linear.weight.detach())

    def groups(self, group: int) -> Tensor:
        order = torch.randperm(self.in_features, generator=torch.Generator().manual_seed(0))
        return (order // group).to(torch.int32)

    @torch.no_grad()
    def store(self, weight: Tensor) -> None:
        """Quantise W (N, K) into the buffers."""
        numbers = weight.float().T  # (K, N)
        index = self.g_idx.long()[:, None].expand_as(numbers)
        low = torch.full_like(self.scales, 0.0).scatter_reduce_(0, index, numbers, "amin")
        high = torch.full_like(self.scales, 0.0).scatter_reduce_(0, index, numbers, "amax")
        scales = ((high - low) / 15).clamp_min(1e-8)
        zeros = (-low / scales).round().clamp(1, 15)
        rounded = (numbers / scales[self.g_idx] + zeros[self.g_idx]).round().clamp(0, 15)
        order = ORDER if self.awq else tuple(range(EIGHT))
        stored = {
            "qweight": pack(rounded, 1 if self.awq else 0, order),
            "qzeros": pack(zeros - (0 if self.awq else 1), 1, order),
            "scales": scales,
        }
        for name, value in stored.items():
            if name in self._buffers:
                getattr(self, name).copy_(value)
            else:
                self.register_buffer(name, value)

    def dequantized(self) -> Tensor:
        return _weight(self.qweight, self.qzeros, self.scales, self.g_idx, self.awq)

    def forward(self, x: Tensor) -> Tensor:
        y = packed_gemm(x, self.qweight, self.qzeros, self.scales, self.g_idx, self.awq)
        return y if self.bias is None else y + self.bias


class GptqLinear(PackedLinear):
    """GPTQ's layout."""


class AwqLinear(PackedLinear):
    """AWQ's layout, with groups in order."""

    awq = True

    def groups(self, group: int) -> Tensor:
        return (torch.arange(self.in_features) // group).to(torch.int32)
