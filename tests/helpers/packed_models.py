"""One small decoder twice: with packed projections (lorafx.layers) and with each by itself.

`Apart` is the checkpoint's model and the oracle's; `Packed` computes the same from packed weights.
"""

from __future__ import annotations

import torch
from hand_made import factors
from torch import Tensor, nn

from lorafx.layers import (
    MergedColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
    load_weights,
)

WIDTH, HEAD, HEADS, KV_HEADS, INNER, VOCABULARY = 16, 4, 4, 2, 12, 20
Q, KV = HEADS * HEAD, KV_HEADS * HEAD
#: Slices of in_proj_qkvz: key, query, value, gate; unequal, so that no split by halves is right.
MIXER = (6, 6, 10, 4)
#: A projection -> (the packed one, its slices there).
PACKED_AS = {
    "q_proj": ("qkv_proj", (0,)),
    "k_proj": ("qkv_proj", (1,)),
    "v_proj": ("qkv_proj", (2,)),
    "gate_proj": ("gate_up_proj", (0,)),
    "up_proj": ("gate_up_proj", (1,)),
    "in_proj_qkv": ("in_proj_qkvz", (0, 1, 2)),
    "in_proj_z": ("in_proj_qkvz", (3,)),
}
MAPPING = {
    "qkv_proj": ["q_proj", "k_proj", "v_proj"],
    "gate_up_proj": ["gate_proj", "up_proj"],
    "in_proj_qkvz": {"in_proj_qkv": (0, 1, 2), "in_proj_z": 3},
}


class _Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down_proj = nn.Linear(INNER, WIDTH, bias=False)

    def qkv(self, x: Tensor) -> tuple[Tensor, ...]:
        raise NotImplementedError

    def gate_up(self, x: Tensor) -> tuple[Tensor, ...]:
        raise NotImplementedError

    def mixer(self, x: Tensor) -> tuple[Tensor, ...]:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x)
        groups = HEADS // KV_HEADS
        q, k, v = (t.unflatten(-1, (-1, HEAD)).transpose(1, 2) for t in (q, k, v))
        k, v = (t.repeat_interleave(groups, dim=1) for t in (k, v))
        attended = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o_proj(attended.transpose(1, 2).flatten(-2))
        qkv, z = self.mixer(x)
        x = x + torch.nn.functional.pad(torch.tanh(qkv)[..., :WIDTH], (0, 0))
        x = x + torch.nn.functional.pad(z.sigmoid(), (0, WIDTH - z.shape[-1]))
        gate, up = self.gate_up(x)
        return x + self.down_proj(nn.functional.silu(gate) * up)


class ApartLayer(_Layer):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(WIDTH, Q)
        self.k_proj = nn.Linear(WIDTH, KV)
        self.v_proj = nn.Linear(WIDTH, KV)
        self.o_proj = nn.Linear(Q, WIDTH, bias=False)
        self.in_proj_qkv = nn.Linear(WIDTH, sum(MIXER[:3]), bias=False)
        self.in_proj_z = nn.Linear(WIDTH, MIXER[3], bias=False)
        self.gate_proj = nn.Linear(WIDTH, INNER, bias=False)
        self.up_proj = nn.Linear(WIDTH, INNER, bias=False)

    def qkv(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.q_proj(x), self.k_proj(x), self.v_proj(x)

    def gate_up(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.gate_proj(x), self.up_proj(x)

    def mixer(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.in_proj_qkv(x), self.in_proj_z(x)


class PackedLayer(_Layer):
    def __init__(self) -> None:
        super().__init__()
        self.qkv_proj = QKVParallelLinear(WIDTH, HEAD, HEADS, KV_HEADS)
        self.o_proj = RowParallelLinear(Q, WIDTH, bias=False)
        self.in_proj_qkvz = MergedColumnParallelLinear(WIDTH, MIXER, bias=False)
        self.gate_up_proj = MergedColumnParallelLinear(WIDTH, [INNER, INNER], bias=False)

    def qkv(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.qkv_proj(x).split([Q, KV, KV], dim=-1)

    def gate_up(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.gate_up_proj(x).chunk(2, dim=-1)

    def mixer(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.in_proj_qkvz(x).split([sum(MIXER[:3]), MIXER[3]], dim=-1)


class _Decoder(nn.Module):
    layer: type[_Layer]

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList(self.layer() for _ in range(2))
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, input_ids: Tensor) -> dict[str, Tensor]:
        x = self.embed(input_ids)
        for layer in self.layers:
            x = layer(x)
        return {"logits": self.head(x)}


class Apart(_Decoder):
    layer = ApartLayer


class Packed(_Decoder):
    layer = PackedLayer
    packed_modules_mapping = MAPPING


def twins() -> tuple[Apart, Packed]:
    """Both models with the same weights."""
    torch.manual_seed(0)
    apart = Apart().eval().requires_grad_(False)
    packed = Packed().eval().requires_grad_(False)
    load_weights(packed, apart.state_dict().items())
    return apart, packed


def packed_factors(
    layer: int, name: str, *, rank: int, seed: int
) -> tuple[dict[str, tuple[Tensor, Tensor]], dict[str, tuple[Tensor, Tensor]]]:
    """An adapter that was trained on the packed projection `name`: one A, and B over all slices.

    Returns:
        Its factors by the packed path, and the same update by the paths of `Apart`.
    """
    _, packed = twins()
    path = f"layers.{layer}.{name}"
    ((_, (a, b)),) = factors(packed, [path], rank=rank, seed=seed).items()
    sizes = packed.get_submodule(path).output_sizes
    rows = b.split(list(sizes))
    members = {
        own: slices for own, (packed_name, slices) in PACKED_AS.items() if packed_name == name
    }
    apart = {
        f"layers.{layer}.{own}": (a, torch.cat([rows[i] for i in slices]))
        for own, slices in members.items()
    }
    return {path: (a, b)}, apart
