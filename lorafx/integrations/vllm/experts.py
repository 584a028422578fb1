"""Routed experts on a CPU with LoRA. vLLM has none: its experts for a CPU compute both products in
one kernel, and LoRA belongs between them.

    h[t, j] = x[t] W13[e]ᵀ + delta    e the j-th expert of token t
    y[t]    = Σ_j w[t, j] · (act(h[t, j]) W2[e]ᵀ + delta)
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from lorafx.kernels.cpu.grouped_mm import GROUPED_MM


@functools.cache
def experts_class() -> Any:
    """The class, a subclass of vLLM's."""
    from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts
    from vllm.model_executor.layers.fused_moe.experts.lora_experts_mixin import LoRAExpertsMixin

    class LoraCpuExperts(LoRAExpertsMixin, CPUUnquantizedExperts):
        def process_weights_after_loading(self, layer: Any) -> None:
            """Weights stay as they were loaded, which the grouped product reads."""

        def apply(
            self,
            output: Tensor,
            hidden_states: Tensor,
            w1: Tensor,
            w2: Tensor,
            topk_weights: Tensor,
            topk_ids: Tensor,
            activation: Any,
            global_num_experts: int,
            expert_map: Tensor | None,
            a1q_scale: Tensor | None,
            a2_scale: Tensor | None,
            workspace13: Tensor,
            workspace2: Tensor,
            expert_tokens_meta: Any,
            apply_router_weight_on_input: bool,
        ) -> None:
            site = self._lora_context.punica_wrapper
            slots = site.wrapper.tokens.slots
            T, k = topk_ids.shape
            product = Routed(topk_ids, len(w1))
            x = hidden_states.unsqueeze(1).expand(-1, k, -1)
            h = product(x.flatten(0, 1), w1, self.w1_bias).view(T, k, -1)
            site.up.route_(h, x, topk_ids, slots)
            act = h.new_empty(T * k, self.adjust_N_for_activation(h.shape[-1], activation))
            self.activation(activation, act, h.flatten(0, 1))
            y = product(act, w2, self.w2_bias).view(T, k, -1)
            site.down.route_(y, act.view(T, k, -1), topk_ids, slots)
            if apply_router_weight_on_input:
                topk_weights = torch.ones_like(topk_weights)
            weights = topk_weights.to(y.dtype).unsqueeze(1)
            output.copy_((weights @ y).squeeze(1))

    return LoraCpuExperts


class Routed:
    """Products of rows (M, K), row m of expert `experts.flatten()[m]` of `count`."""

    def __init__(self, experts: Tensor, count: int) -> None:
        self.experts = experts.flatten()
        self.order = self.experts.argsort(stable=True)
        # Of a size that no data decides, for torch.compile.
        chosen = self.experts.unsqueeze(1) == torch.arange(count, device=experts.device)
        self.ends = chosen.sum(0).cumsum(0).to(torch.int32)

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """(M, N) for W (E, N, K) and b (E, N)."""
        product = GROUPED_MM(x[self.order], weight.transpose(1, 2), self.ends)
        y = torch.empty_like(product)
        y[self.order] = product
        return y if bias is None else y + bias[self.experts]
