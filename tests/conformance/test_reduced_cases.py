"""What families of transformers taught, in its smallest form, against the dense-merge oracle."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from oracle import Oracle, assert_close, save_adapter
from torch import Tensor, nn

import lorafx

NAMES = ("one", None, "two")


def check(
    model: nn.Module, folder: Path, targets: list[str], **arguments: Tensor
) -> lorafx.CompiledModel:
    """Two adapters of unequal ranks on `targets`: one adapter a batch, then mixed with a base
    row, equal the oracle."""
    torch.manual_seed(0)
    model.eval().requires_grad_(False)
    adapters = {
        name: save_adapter(model, folder / name, rank=rank, targets=targets, seed=rank)
        for name, rank in (("one", 2), ("two", 3))
    }
    oracle = Oracle.of(model, adapters)
    compiled = lorafx.compile(model, adapters, options={"lowering": "reference"})
    rows = len(next(iter(arguments.values())))
    for names in (["one"] * rows, ["two"] * rows, [NAMES[row % 3] for row in range(rows)]):
        found = compiled(**arguments, adapter_names=names)
        assert_close(found, oracle.rows(names, arguments), label=str(names))
    return compiled


class ScaledEmbedding(nn.Embedding):
    embed_scale = 3.0

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) * self.embed_scale


class TiedHead(nn.Module):
    """bart, biogpt, blenderbot: a scaled embedding and a head share one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = ScaledEmbedding(11, 6)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.embed(input_ids)))


def test_scaled_embedding_tied_to_a_head(tmp_path: Path) -> None:
    ids = torch.randint(0, 11, (3, 5))
    check(TiedHead(), tmp_path, ["embed", "head"], input_ids=ids)


class Siblings(nn.Module):
    """q and k of one x, whose readers depend on the memory layout of y."""

    def __init__(self, chunks: bool) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(8, 8), nn.Linear(8, 8)
        self.chunks = chunks

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        if self.chunks:  # longformer: overlapping chunks
            q, k = self.q(x), self.k(x)
            size, stride = (batch, length - 1, 2, 8), (length * 8, 8, 8, 1)
            return torch.tanh(q.as_strided(size, stride) * k.as_strided(size, stride)).sum(2)
        # fsmt: sequence first, then (batch · heads, length, head) as a view
        q, k = self.q(x.transpose(0, 1)), self.k(x.transpose(0, 1))
        q, k = (y.view(length, batch * 2, 4).permute(1, 0, 2) for y in (q, k))
        scores = q.reshape(batch, 2, length, 4) @ k.reshape(batch, 2, length, 4).mT
        return (scores @ k.reshape(batch, 2, length, 4)).permute(0, 2, 1, 3).flatten(2)


@pytest.mark.parametrize("chunks", [False, True])
def test_readers_of_packed_siblings_that_address_memory(tmp_path: Path, chunks: bool) -> None:
    check(Siblings(chunks), tmp_path, ["q", "k"], x=torch.randn(3, 5, 8))
