"""Stacks of small equal layers, of which one may differ."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from dense_merge import Case
from hand_made import hand_case
from torch import Tensor, nn
from torch.nn import functional as F


def constant(layer: Any) -> None:
    layer.scale = 0.25


def own_forward(layer: Any) -> None:
    layer.norm.forward = lambda h: F.layer_norm(h, h.shape[-1:]) * 2


def hook(layer: Any) -> None:
    layer.norm.register_forward_hook(lambda module, args, output: output + 1)


def dtype(layer: Any) -> None:
    layer.norm.double()


H, LAYERS = 6, 4


class Block(nn.Module):
    """h + down(act(up(norm(h)))) · scale."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(H)
        self.up = nn.Linear(H, 2 * H)
        self.down = nn.Linear(2 * H, H, bias=False)
        self.act: Any = torch.tanh
        self.scale = 0.5

    def forward(self, h: Tensor) -> Tensor:
        y = self.act(self.up(self.norm(h.to(self.norm.weight.dtype)).to(h.dtype)))
        return h + self.down(y.reshape(*h.shape[:-1], 2 * H)).mul(self.scale) + h.sin()


class Stack(nn.Module):
    def __init__(self, block: Callable[[], nn.Module] = Block, count: int = LAYERS) -> None:
        super().__init__()
        self.layers = nn.ModuleList(block() for _ in range(count))
        self.register_buffer("memory", torch.zeros(H))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        for layer in self.layers:
            x = layer(x)
        return {"logits": x}


def case_of(base: nn.Module, folder: Path) -> Case:
    paths = [f"layers.{index}.{name}" for index in range(LAYERS) for name in ("up", "down")]
    return hand_case(base, folder, a0=paths, a1=paths[1:])


def stack(tmp_path: Path, change: Callable[[nn.Module], Any] | None = None, at: int = 1) -> Case:
    torch.manual_seed(0)
    base = Stack().eval().requires_grad_(False)
    if change is not None:
        change(base.layers[at])
    return case_of(base, tmp_path)
