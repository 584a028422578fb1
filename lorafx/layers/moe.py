"""Routed experts with fused weights, as plain tensor code that is captured as one graph.

    p = softmax(router_logits)  (T, E);   c = p of the top k experts, renormalised
    y = Σ_e c_e · (silu(x G_eᵀ) ⊙ (x U_eᵀ)) D_eᵀ,    w13_e = [G_e; U_e] (2I, H),  w2_e = D_e (H, I)

The T·k pairs of a token and an expert are sorted by expert and multiplied in groups, so that no
size depends on values. I is sharded over the ranks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lorafx.kernels.cpu.grouped_mm  # noqa: F401  defines the op
from lorafx.errors import CheckpointError, ConfigError
from lorafx.layers.base import checked_sizes, group_of
from lorafx.torch_internals.graph_parts import grouped_mm
from lorafx.weights.loadable_layers import LoadableLayer

if TYPE_CHECKING:
    import torch.distributed as dist

#: Shard ids of loaders: the projection and the expert, or None.
ExpertShard = tuple[str, int] | None


class FusedMoE(LoadableLayer):
    """hidden_states (…, H), router_logits (…, E) → (…, H).

    Parameters are `w13_weight` (E, 2I / tp_size, H) and `w2_weight` (E, H, I / tp_size), each a
    LoRA site with a delta for each expert. Shard ids of `load_weight`: ("w1", e) the gate, ("w3",
    e) the up and ("w2", e) the down projection of expert e; None for all experts as one tensor (E,
    2I, H) or (E, H, I).

    Args:
        num_experts, top_k: E and k.
        hidden_size, intermediate_size: H and I.
        renormalize: divide the chosen experts' probabilities by their sum.

    Raises ConfigError for sizes that are not positive, k > E, or I that the ranks cannot divide.
    """

    w13_weight: Tensor
    w2_weight: Tensor

    def __init__(
        self,
        num_experts: int,
        top_k: int,
        hidden_size: int,
        intermediate_size: int,
        *,
        renormalize: bool = True,
        params_dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        prefix: str = "",
        tp_group: dist.ProcessGroup | None = None,
        disable_tp: bool = False,
    ) -> None:
        super().__init__()
        self.prefix = prefix
        checked_sizes(
            self.label,
            num_experts=num_experts,
            top_k=top_k,
            hidden_size=hidden_size,
            intermediate_size=intermediate_size,
        )
        if top_k > num_experts:
            raise ConfigError(
                f"{self.label}: top_k = {top_k} must be between 1 and num_experts = {num_experts}"
            )
        self.tp = group_of({"tp_group": tp_group, "disable_tp": disable_tp})
        self.tp_size, self.tp_rank = self.tp.size, self.tp.rank
        self.num_experts, self.top_k, self.renormalize = num_experts, top_k, renormalize
        self.hidden_size, self.intermediate_size = hidden_size, intermediate_size
        part = self.tp.part(intermediate_size, "intermediate_size", self.label)
        self.intermediate_size_per_partition = part
        shapes = {
            "w13_weight": (num_experts, 2 * part, hidden_size),
            "w2_weight": (num_experts, hidden_size, part),
        }
        for name, shape in shapes.items():
            weight = torch.empty(shape, dtype=params_dtype, device=device)
            bound = (hidden_size if name == "w13_weight" else intermediate_size) ** -0.5
            nn.init.uniform_(weight, -bound, bound)
            self.add_weight(name, weight)

    def forward(self, hidden_states: Tensor, router_logits: Tensor) -> Tensor:
        x = hidden_states.reshape(-1, self.hidden_size)
        shares, experts = self.route(router_logits.reshape(-1, self.num_experts))
        _, order, ends = sorted_by_expert(experts, self.num_experts)
        inner = grouped_product(x[order // self.top_k], self.w13_weight.transpose(1, 2), ends)
        gate, up = inner.chunk(2, dim=-1)
        y = grouped_product(F.silu(gate) * up, self.w2_weight.transpose(1, 2), ends)
        y = y[order.argsort()].unflatten(0, (-1, self.top_k))
        y = (y * shares.to(y.dtype).unsqueeze(-1)).sum(dim=1)
        return self.tp.all_reduce(y).reshape(hidden_states.shape)

    def route(self, router_logits: Tensor) -> tuple[Tensor, Tensor]:
        """router_logits (T, E) → c float32 and the experts int64, both (T, k)."""
        probabilities = router_logits.softmax(dim=-1, dtype=torch.float32)
        chosen, experts = probabilities.topk(self.top_k, dim=-1)
        if self.renormalize:
            chosen = chosen / chosen.sum(dim=-1, keepdim=True)
        return chosen, experts

    def _load(self, name: str, loaded: Tensor, shard_id: ExpertShard) -> None:
        part = self.intermediate_size_per_partition
        target = self.get_parameter(name).data
        if shard_id is not None:
            target, loaded = target[shard_id[1]][None], loaded[None]
        if name == "w2_weight":
            target.copy_(self.own_inner(loaded, dim=2))
            return
        halves = (0, 1) if shard_id is None else (("w1", "w3").index(shard_id[0]),)
        rows = loaded.split(self.intermediate_size, dim=1)
        for half, value in zip(halves, rows, strict=True):
            target[:, half * part : (half + 1) * part].copy_(self.own_inner(value, dim=1))

    def own_inner(self, value: Tensor, dim: int) -> Tensor:
        """This rank's part of `value`, which has all I inner features along `dim`."""
        part = self.intermediate_size_per_partition
        return value.narrow(dim, self.tp_rank * part, part)

    def checkpoint_shape(self, name: str, shard_id: ExpertShard = None) -> tuple[int, ...]:
        experts, hidden, inner = self.num_experts, self.hidden_size, self.intermediate_size
        if shard_id is None:
            shapes = {"w13_weight": (2 * inner, hidden), "w2_weight": (hidden, inner)}
            return (experts, *shapes[name])
        self._check_shard(name, shard_id)
        return (hidden, inner) if name == "w2_weight" else (inner, hidden)

    def _check_shard(self, name: str, shard_id: Any) -> None:
        known = ("w2",) if name == "w2_weight" else ("w1", "w3")
        if (
            not isinstance(shard_id, tuple)
            or len(shard_id) != 2
            or shard_id[0] not in known
            or not 0 <= shard_id[1] < self.num_experts
        ):
            raise CheckpointError(
                f"{self.label}: no shard id {shard_id!r} of {name}; give "
                f"({' or '.join(map(repr, known))}, expert), experts 0 to {self.num_experts - 1}"
            )

    def pieces(self, name: str, shard_id: ExpertShard = None) -> frozenset[Any]:
        if shard_id is not None:
            self._check_shard(name, shard_id)
            return frozenset([shard_id])
        kinds = ("w2",) if name == "w2_weight" else ("w1", "w3")
        return frozenset((kind, e) for kind in kinds for e in range(self.num_experts))

    def extra_repr(self) -> str:
        return (
            f"num_experts={self.num_experts}, top_k={self.top_k}, "
            f"hidden_size={self.hidden_size}, intermediate_size={self.intermediate_size}, "
            f"tp_size={self.tp_size}"
        )


def sorted_by_expert(experts: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """The chosen experts in ascending order, where each stood, and where each expert's rows end."""
    ids, order = experts.flatten().sort(stable=True)
    numbers = torch.arange(count, device=ids.device)
    return ids, order, torch.searchsorted(ids, numbers, right=True).to(torch.int32)


def grouped_product(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    if torch.is_autocast_enabled(x.device.type):  # as autocast does for matmul
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight = x.to(dtype), weight.to(dtype)
    # The kernel for accelerators is for bfloat16, and for rows of 16 bytes.
    if x.is_cuda and x.dtype == torch.bfloat16 and not any(n % 8 for n in weight.shape[1:]):
        return grouped_mm(x, weight, offs=ends)
    product: Tensor = torch.ops.lorafx.grouped_mm(x, weight, ends)
    return product
