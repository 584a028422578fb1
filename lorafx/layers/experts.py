"""The experts of transformers' models, computed as two products of sorted rows:
`model.set_experts_implementation("lorafx")`.

    h = act(x W_upᵀ[e])    or    gated(x W_upᵀ[e]),    y = Σ_e c_e · h W_downᵀ[e]

Dense weights are multiplied by lorafx::grouped_mm, quantised ones by lorafx::stored_grouped_mm, as
they are stored. It needs no lorafx.compile.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import lorafx.kernels.cpu.stored_grouped_mm  # noqa: F401  defines the op
from lorafx.errors import ConfigError
from lorafx.layers.moe import grouped_product, sorted_by_expert
from lorafx.model.stored_experts import parts_of, stored_of


def forward(
    module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """hidden_states (T, H), top_k_index and top_k_weights (T, k) → (T, H), in the dtype of
    hidden_states. An index of E or more, of an expert of another rank, adds nothing where its
    weight is zero. Raises ConfigError for a format of which one expert cannot be read alone."""
    count, top_k = module.num_experts, top_k_index.shape[-1]
    ids, order, ends = sorted_by_expert(top_k_index, count)
    gated = getattr(module, "has_gate", True)
    ids = ids.clamp(max=count - 1)
    x = hidden_states[order // top_k]
    inner = _product(module, "gate_up_proj" if gated else "up_proj", x, ids, ends)
    inner = module._apply_gate(inner) if gated else module.act_fn(inner)
    y = _product(module, "down_proj", inner, ids, ends)
    if getattr(module, "has_post_expert_norm", False):
        y = module.post_expert_norm(y)
    y = y[order.argsort()].unflatten(0, (-1, top_k))
    y = (y * top_k_weights.unsqueeze(-1)).sum(dim=1)
    return y.to(hidden_states.dtype)


def _product(module: Any, name: str, x: Tensor, ids: Tensor, ends: Tensor) -> Tensor:
    """Rows of x times the weights of their experts `ids`, with the experts' biases."""
    stored, turned = stored_of(module, name), module.is_transposed
    if isinstance(stored, str):
        raise ConfigError(stored)
    if stored is None:
        weight = getattr(module, name)
        y = grouped_product(x.to(weight.dtype), weight if turned else weight.mT, ends)
    else:
        parts, form = parts_of(module, stored), (stored.form, stored.sizes, turned)
        y = torch.ops.lorafx.stored_grouped_mm(x.to(stored.dtype), parts, ends, *form)
    return y + getattr(module, f"{name}_bias")[ids] if module.has_bias else y
