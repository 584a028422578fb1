"""Indices of a call that are outside of the table that they point into: refused by name before the
graph runs. Generated code checks them on all threads of a CPU at once, where an error ends the
process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from attached import attached, compiled, fresh_dynamo, served  # noqa: F401  (the fixture)
from dense_merge import TOLERANCE, Case, error
from hand_made import hand_case
from slowly import few
from tiny_models import VOCAB, token_inputs
from torch import nn
from transformers import StaticCache

import lorafx
from lorafx import OutOfRangeError


def ids(rows: int = 3, length: int = 4, **wrong: int) -> torch.Tensor:
    tokens = torch.ones(rows, length, dtype=torch.int64)
    for place, token in wrong.items():
        tokens.view(-1)[int(place[1:])] = token
    return tokens


@pytest.mark.parametrize("names", few([None, ["a1", None, "a3"]], None))
def test_token_ids(case_of: Callable[..., Case], names: Any) -> None:
    cm = case_of("gpt2").compile()
    good = cm(input_ids=ids(), adapter_names=names).logits
    said = rf"input_ids\[1, 2\] is {VOCAB}, but transformer.wte.weight has {VOCAB} entries: 0 to"
    for _ in range(2):
        with pytest.raises(OutOfRangeError, match=said):
            cm(input_ids=ids(_6=VOCAB), adapter_names=names)
    with pytest.raises(IndexError, match=r"\[0, 3\] is -1, .* 2 of 12 are outside"):
        cm(input_ids=ids(_3=-1, _5=-100), adapter_names=names)
    graphs = cm.recompiles
    assert torch.equal(cm(input_ids=ids(), adapter_names=names).logits, good)
    assert cm.recompiles == graphs


def test_positions(case_of: Callable[..., Case]) -> None:
    cm = case_of("gpt2").compile(dynamic=True)
    positions = torch.arange(4)[None] + 61
    with pytest.raises(OutOfRangeError, match=r"position_ids\[0, 3\] is 64, but .*wpe.weight has"):
        cm(input_ids=ids(), position_ids=positions)
    with pytest.raises(OutOfRangeError, match=r"\[64\] .* the sizes of this call is 64, but .*wpe"):
        cm(input_ids=ids(3, 70))


def test_labels(case_of: Callable[..., Case]) -> None:
    cm = case_of("bert").compile()
    assert torch.isfinite(cm(input_ids=ids(), labels=ids(_1=-100)).loss)
    with pytest.raises(OutOfRangeError, match=rf"labels\[1, 1\] is {VOCAB}, but"):
        cm(input_ids=ids(), labels=ids(_1=-100, _5=VOCAB))


def test_places_behind_a_static_cache(llama: Case) -> None:
    cm = llama.compile()
    cache = StaticCache(config=cm.config, max_cache_len=6)
    cm(input_ids=ids(), past_key_values=cache)
    with pytest.raises(OutOfRangeError, match="past_key_values is 6, but past_key_values has 6"):
        cm(input_ids=ids(), past_key_values=cache)


@pytest.mark.slow
def test_models_that_users_compile(llama: Case) -> None:
    model = attached(llama)
    call = compiled(model)
    inputs = token_inputs(3, 4)
    served(call, model, ["a0", None, "a1"], inputs)
    inputs["input_ids"][2, 1] = VOCAB
    with pytest.raises(OutOfRangeError, match=r"\[2, 1\] is"):
        served(call, model, ["a0", None, "a1"], inputs)


@pytest.mark.slow
def test_saved_graphs(llama: Case, tmp_path: Path) -> None:
    cache, model = tmp_path / "graphs", llama.model()
    cache.mkdir(mode=0o700)
    options = {"lowering": "reference", "cache": str(cache), "base_graphs": True}
    call: dict[str, Any] = {"adapter_names": ["a0", None, "a1"], "attention_mask": ids()}
    lorafx.compile(model, llama.folders, options=options)(input_ids=ids(), **call)
    torch._dynamo.reset()
    cm = lorafx.compile(llama.model(), llama.folders, options=options)
    cm(input_ids=ids(), **call)
    assert [record.saved for record in cm._session.backend.records] == ["loaded from the folder"]
    with pytest.raises(OutOfRangeError, match=r"input_ids\[0, 0\]"):
        cm(input_ids=ids(_0=VOCAB), **call)


class Far(nn.Module):
    """Embeds what a function makes of indices, far from where a call gives them."""

    def __init__(self, made: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        self.made = made
        self.kinds, self.out = nn.Embedding(8, 6), nn.Linear(6, 4)
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
        self.register_buffer("gain", torch.ones(()))
        self.register_buffer("gains", torch.ones(1))

    def forward(self, x: torch.Tensor, index: torch.Tensor) -> dict[str, torch.Tensor]:
        for layer in self.layers:
            x = torch.relu(layer(x)) + self.made(self, index)
        return {"logits": self.out(x)}


def pairs(index: torch.Tensor) -> torch.Tensor:
    return index[:, :, None] - index[:, None, :]


def by_gather(model: Far, index: torch.Tensor) -> torch.Tensor:
    table = model.kinds.weight[:, 0].expand(*index.shape, 8)
    return torch.take_along_dim(table, pairs(index), 2).sum(-1, keepdim=True)


def by_weight(model: Far, index: torch.Tensor) -> torch.Tensor:
    return model.kinds((index * model.gains).long())


def far_case(made: Any, folder: Path) -> Case:
    base = Far(made).eval().requires_grad_(False)
    return hand_case(base, folder, a0=["layers.0", "layers.2"], a1=["layers.1", "out"])


@pytest.mark.parametrize("made", [by_gather, pytest.param(by_weight, marks=pytest.mark.slow)])
def test_an_index_far_from_a_call_never_ends_the_process(made: Any, tmp_path: Path) -> None:
    """What cannot be checked before the graph runs is checked inside of it: with so many rows
    generated code uses all threads."""
    case, names = far_case(made, tmp_path), ["a0", "a1", *[None] * 298]
    cm = case.compile({"lowering": "inductor"})
    x, index = torch.randn(300, 8, 6), torch.zeros(300, 8, dtype=torch.int64)
    wrong = index.clone()
    wrong[200:, 3] = 99
    expected = case.expected(names, {"x": x, "index": index})
    graphs = []
    for _ in range(2):
        got = cm(x=x, index=index, adapter_names=names)["logits"]
        assert error(got, expected) <= TOLERANCE
        graphs.append(cm.recompiles)
        with pytest.raises(OutOfRangeError, match=r"\[200, .* that the model makes of index is"):
            cm(x=x, index=wrong, adapter_names=names)
    assert graphs[0] == cm.recompiles
