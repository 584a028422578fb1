"""The lengths of all layers' caches grow in place; what was read of them before stays."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from dense_merge import TOLERANCE, build_case, error
from hand_made import hand_case
from torch import Tensor, nn

aten = torch.ops.aten
NAMES = ["a0", None, "a1"]


@pytest.mark.slow
def test_the_lengths_of_a_static_cache_grow(tmp_path: Path) -> None:
    """A prompt, where the cache is made and its lengths are returned too, and two steps. Masks and
    positions are computed from the first layer's length."""
    case = build_case("llama", tmp_path)
    cm: Any = case.compile(options={"lowering": "inductor"}, dynamic=True)
    past = transformers.StaticCache(config=cm.model.config, max_cache_len=9)
    lengths = [layer.cumulative_length for layer in past.layers]
    ids = torch.tensor([[7, 40, 12, 5, 8], [9, 9, 31, 2, 4], [60, 5, 17, 33, 33]])
    given = {"past_key_values": past, "adapter_names": NAMES}
    outputs = [cm(input_ids=ids[:, :3], **given)["logits"]]
    outputs += [cm(input_ids=ids[:, place : place + 1], **given)["logits"] for place in (3, 4)]
    assert error(torch.cat(outputs, 1), case.expected(NAMES, {"input_ids": ids})) <= TOLERANCE
    assert [int(length) for length in lengths] == [5] * len(past.layers)
    assert all(
        layer.cumulative_length is length
        for layer, length in zip(past.layers, lengths, strict=True)
    )


class ReturnsOld(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(16, 16)

    def forward(self, x: Tensor, lengths: list[Tensor]) -> dict[str, Any]:
        zero = torch.zeros((), dtype=torch.int64)
        old = [lengths[0].clone(), (lengths[1] + 0).expand(2), lengths[0] + zero]
        for length in lengths:
            length += x.shape[1]
        return {"logits": self.up(x), "old": old}


def test_lengths_from_before_are_returned_as_they_were(tmp_path: Path) -> None:
    case = hand_case(ReturnsOld(), tmp_path, a0=["up"])
    cm: Any = case.compile({"lowering": "inductor"}, dynamic=False)
    lengths = [torch.tensor(2), torch.tensor(5)]
    out = cm(x=torch.randn(2, 3, 16), lengths=lengths, adapter_names=["a0", None])
    assert [*map(int, lengths)] == [5, 8]
    assert [each.tolist() for each in out["old"]] == [2, [5, 5], 2]
    assert out["old"][0].data_ptr() != out["old"][2].data_ptr()
