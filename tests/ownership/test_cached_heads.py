"""Heads of cached keys are symbols of a graph until a view says how many there are."""

from __future__ import annotations

from pathlib import Path

import torch
from dense_merge import REFERENCE, TOLERANCE, case_by_patterns, error
from torch import Tensor, nn

import lorafx

HEADS, EACH = 4, 2


class CrossAttention(nn.Module):
    """The decoder's attention over what its encoder left, as BART's kin write it with `bmm`."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.out = nn.Linear(8, 8), nn.Linear(8, 8)
        for parameter in self.parameters():
            nn.init.normal_(parameter.requires_grad_(False), std=0.4)

    def forward(self, x: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> dict[str, Tensor]:
        rows, length, _ = x.shape
        folded = (rows * HEADS, -1, EACH)
        query = self.query(x).view(rows, length, HEADS, EACH).transpose(1, 2).reshape(folded)
        keys, values = keys.reshape(folded), values.reshape(folded)
        weights = torch.bmm(query, keys.transpose(1, 2))
        source = keys.shape[1]
        if weights.shape != (rows * HEADS, length, source):
            raise ValueError
        weights = weights.view(rows, HEADS, length, source) + mask
        weights = weights.view(rows * HEADS, length, source).softmax(-1)
        y = torch.bmm(weights, values).view(rows, HEADS, length, EACH).transpose(1, 2)
        return {"logits": self.out(y.reshape(rows, length, HEADS * EACH))}


def test_attention_over_a_cache_of_the_encoder(tmp_path: Path) -> None:
    torch.manual_seed(0)
    case = case_by_patterns(CrossAttention().eval(), tmp_path, {"a": "query|out", "b": "out"})
    cm = lorafx.compile(case.model(), case.folders, dynamic=True, options=REFERENCE)
    for rows, source in ((3, 5), (4, 7)):
        inputs = {
            "x": torch.randn(rows, 1, HEADS * EACH),
            "keys": torch.randn(rows, HEADS, source, EACH),
            "values": torch.randn(rows, HEADS, source, EACH),
            "mask": torch.zeros(rows, 1, 1, source),
        }
        names = ["a", None, "b", "a"][:rows]
        got = cm(**inputs, adapter_names=names)["logits"]
        assert error(got, case.expected(names, inputs)) <= TOLERANCE
