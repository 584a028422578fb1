"""Layers whose rows all requests share (positions, tables): mixed batches against dense merge.

Each model has a linear or an embedding whose input depends on no request, and another way in which
what it computes meets the requests' own rows.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from attached import fresh_dynamo  # noqa: F401  (the fixture)
from dense_merge import Case, check_mixed
from slowly import few
from torch import Tensor, nn

from lorafx.errors import ProvenanceError

D, HEADS = 8, 2
MIXES = (["a", None, "b"], ["b", "a"], [None, "b", "b", "a"], ["a", "a", "a"], [None, "b", None])


def positions(length: int) -> Tensor:
    return torch.arange(length)[:, None] * torch.linspace(0.1, 1.3, D)


class Added(nn.Module):
    """Learned positions and projected ones are added to every request."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.pos, self.up = nn.Embedding(32, D), nn.Linear(D, D), nn.Linear(D, 5)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        ids = torch.arange(x.shape[1], device=x.device)
        x = x + self.table(ids) + self.pos(positions(x.shape[1]).sin()[None])
        return {"logits": self.up(x.tanh())}

    sites = ("table", "pos", "up")


class Relative(nn.Module):
    """Relative positions as in Transformer-XL: queries times keys of positions."""

    sites = ("pos", "query", "key")

    def __init__(self) -> None:
        super().__init__()
        self.pos, self.query, self.key = (nn.Linear(D, D) for _ in range(3))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        def heads(y: Tensor) -> Tensor:
            return y.view(y.shape[0], -1, HEADS, D // HEADS).transpose(1, 2)

        p = heads(self.pos(positions(2 * x.shape[1] - 1).sin()[None]))
        scores = heads(self.query(x)) @ p.transpose(-1, -2)
        scores = scores[..., : x.shape[1]] + heads(self.query(x)) @ heads(self.key(x)).mT
        return {"logits": scores.softmax(-1) @ heads(x)}


class Sorted(nn.Module):
    """What all share is sorted, which has no rule for copies."""

    sites = ("pos",)

    def __init__(self) -> None:
        super().__init__()
        self.pos = nn.Linear(D, D)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"logits": x @ self.pos(positions(D).sin()).sort(0).values}


def inputs(rows: int, length: int = 8) -> dict[str, Tensor]:
    return {"x": torch.randn(rows, length, D)}


GIVEN = (Added, Relative)


def check_all(cm: Any, case: Case) -> None:
    for mix in MIXES:
        check_mixed(cm, case, mix, inputs(len(mix), 4 * len(mix)))
    captured = cm.recompiles
    check_mixed(cm, case, ["b", None, "a", "a", "b"], inputs(5))
    check_mixed(cm, case, ["b", "a"], inputs(2, 12))
    assert cm.recompiles == captured == 1
    check_mixed(cm, case, ["b"], inputs(1))


@pytest.mark.parametrize("model", few(GIVEN, Added), ids=lambda model: model.__name__)
def test_mixed_batches_on_one_graph(model, small):
    case = small(model, model.sites)
    check_all(case.compile(dynamic=True), case)


BERT = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}


def test_tables_that_no_request_chooses_from(small):
    config = transformers.BertConfig(**BERT, num_attention_heads=2, vocab_size=64)
    tables = ("position_embeddings", "token_type_embeddings")
    sites = tuple(f"bert.embeddings.{name}" for name in tables)
    case = small(lambda: transformers.BertForMaskedLM(config), sites, lora_alpha=24)
    cm = case.compile(dynamic=True)
    for mix, length in ((["a", None, "b"], 5), (["b", "b"], 4), (["b", "a", None, "a"], 6)):
        feed = {"input_ids": torch.randint(3, 64, (len(mix), length))}
        feed["attention_mask"] = torch.ones_like(feed["input_ids"])
        feed["attention_mask"][0, length - 1] = 0
        feed["input_ids"][0, length - 1] = 0
        check_mixed(cm, case, mix, feed)
    assert cm.recompiles == 1


def test_what_cannot_be_given_out_is_refused_with_the_operator(small):
    case = small(Sorted, Sorted.sites)
    cm = case.compile()
    check_mixed(cm, case, ["a"] * 3, inputs(3))
    with pytest.raises(
        ProvenanceError, match=r"at pos .*shared by all requests.*aten::sort"
    ) as told:
        cm(**inputs(3), adapter_names=["a", None, "b"])
    assert "self.pos(positions(D)" in str(told.value)


def test_one_slot_a_token_is_refused(small):
    """Which token's copy a shared row would be is not said."""
    case = small(Added, Added.sites)
    cm, x = case.compile(), inputs(2)
    slots = torch.zeros(2, 8, dtype=torch.int32)
    slots[1, 3:] = -1
    with pytest.raises(ProvenanceError, match="at table it is not proved"):
        cm(**x, adapter_slots=slots)
