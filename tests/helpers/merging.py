"""A model with tied weights that is no transformers model, and adapters of either end of them."""

from __future__ import annotations

from pathlib import Path

import torch
from dense_merge import Case
from hand_made import hand_case
from tiny import randomise
from tiny_models import VOCAB
from torch import Tensor, nn


def bits(model: nn.Module) -> dict[str, Tensor]:
    """Copies of all that the model holds."""
    return {name: value.clone() for name, value in model.state_dict().items()}


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, 24)
        self.up = nn.Linear(24, 24)
        self.head = nn.Linear(24, VOCAB, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, input_ids: Tensor) -> dict[str, Tensor]:
        x = self.embed(input_ids)
        return {"logits": self.head(x + torch.tanh(self.up(x)))}


def tied_case(folder: Path) -> Case:
    """Adapters of both ends, of either, and of neither."""
    torch.manual_seed(0)
    base = Tied()
    randomise(base)
    return hand_case(
        base, folder, both=["embed", "head"], embed=["embed"], head=["head"], up=["up"]
    )
