"""The slots of a step's rows, in the place of vLLM's wrapper of LoRA kernels.

Row m of a step has slot `tokens[m]`, and sampled row m `samples[m]`: -1 for the base, and for rows
that no request has. Both stay at fixed addresses, where compiled steps and CUDA graphs read them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lorafx.errors import BatchError
from lorafx.kernels.ops.linear_ops import ADD_DELTA


class SlotTable:
    """Slots of rows, int32 (n,), at a fixed address."""

    def __init__(self, rows: int, device: torch.device | str) -> None:
        with torch.inference_mode(False):
            self.slots = torch.full((rows,), -1, dtype=torch.int32, device=device)
        self.written = 0

    def write(self, slots: Sequence[int]) -> None:
        rest = len(self.slots) - len(slots)
        if rest < 0:
            raise BatchError(
                f"a step of {len(slots)} rows, but vLLM said {len(self.slots)} at most"
            )
        self.written = len(slots)
        on_host = torch.tensor([*slots, *[-1] * rest], dtype=torch.int32, device="cpu")
        on_device = self.slots.device.type != "cpu"
        self.slots.copy_(on_host.pin_memory() if on_device else on_host, non_blocking=on_device)


class LoraWrapper:
    """The slots of a step, which all layers share. It has no layer's factors, so its own methods
    compute from the stacked factors that they are given, in plain aten."""

    def __init__(
        self, max_num_batched_tokens: int, max_batches: int, device: torch.device | str, **_: Any
    ) -> None:
        self.device = device
        self.tokens = SlotTable(max_num_batched_tokens, device)
        self.samples = SlotTable(max_num_batched_tokens, device)

    def update_metadata(
        self, mapping: Any, lora_index_to_id: Sequence[int | None], *_: Any, **__: Any
    ) -> None:
        """vLLM calls it when the mapping of rows to adapters, or of adapters to slots, changes."""
        slots = {adapter: slot for slot, adapter in enumerate(lora_index_to_id) if adapter}
        self.tokens.write([slots[a] if a > 0 else -1 for a in mapping.index_mapping])
        self.samples.write([slots[a] if a > 0 else -1 for a in mapping.prompt_mapping])

    @property
    def token_lora_indices(self) -> Tensor:
        """The slots of the step's tokens, for the head of a classifier of tokens."""
        return self.tokens.slots[: self.tokens.written].long()

    def add_lora_logits(
        self, y: Tensor, x: Tensor, A: Tensor, B: Tensor, scale: float, **_: Any
    ) -> Tensor:
        """y += scale · (x Aᵀ) Bᵀ, for the head of a classifier."""
        return _add(y, x, A, B, scale, self.samples.slots)

    def add_lora_linear(
        self, y: Tensor, x: Tensor, A: Sequence[Tensor], B: Sequence[Tensor], scale: float, *_: Any
    ) -> Tensor:
        """The same for the head of a classifier of tokens, which has one slice."""
        return _add(y, x, A[0], B[0], scale, self.tokens.slots)

    def add_shrink(
        self, y: Tensor, x: Tensor, weights: Sequence[Tensor], scale: float, **_: Any
    ) -> None:
        """y (1, M, N) += scale · x Wᵀ, for the weights (S, 1, N, K) that adapters have for the head
        of a classifier of tokens."""
        W = weights[0]
        identity = torch.eye(W.shape[2], dtype=W.dtype, device=W.device)
        _add(y[0], x, W, identity.expand(len(W), 1, -1, -1), scale, self.tokens.slots)

    def apply_lora_full_linear(
        self,
        y: Tensor,
        x: Tensor,
        weight_stacked: Tensor,
        bias_stacked: Tensor,
        module_enabled: Tensor,
    ) -> Tensor:
        """Rows whose adapter has a classifier of its own are computed with it."""
        slots = self.samples.slots[: self.samples.written].long()
        own, at = slots >= 0, slots.clamp(min=0)
        weights = weight_stacked[at, 0].float()
        replaced = torch.einsum("mk,mnk->mn", x.float(), weights) + bias_stacked[at].float()
        own = own & module_enabled[at]
        return y.copy_(torch.where(own.unsqueeze(-1), replaced.to(y.dtype), y))


def _add(y: Tensor, x: Tensor, A: Tensor, B: Tensor, scale: float, slots: Tensor) -> Tensor:
    """y (M, N) += scale · (x Aᵀ) Bᵀ, for stacked A (S, 1, R, K) and B (S, 1, N, R)."""
    A, B = A[:, 0], B[:, 0].transpose(1, 2)
    capacity, rank, columns = B.shape
    ranks = torch.full((capacity, 1), rank, dtype=torch.int32, device=y.device)
    scales = torch.full((capacity, 1), scale, device=y.device)
    ADD_DELTA(y, x, A, B, ranks, scales, slots, [0], [0], [columns], 1)
    return y
