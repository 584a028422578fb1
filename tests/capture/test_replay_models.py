"""Layers of transformers' models: what Dynamo makes of them where one is traced for all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from dense_merge import build_case
from dynamo_graphs import both_ways
from tiny_models import VOCAB
from torch import Tensor


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("llama", {}),
        *(
            pytest.param(name, sizes, marks=pytest.mark.slow)
            for name, sizes in {
                "qwen3": {},
                "gemma3": {"layer_types": ["sliding_attention", "full_attention"] * 2},
                "gpt2": {"n_layer": 4},
                "phi3": {},
            }.items()
        ),
    ],
)
def test_layers_of_transformers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, sizes: dict[str, Any]
) -> None:
    torch.manual_seed(0)
    depth = sizes if "n_layer" in sizes else {"num_hidden_layers": 4, **sizes}
    case = build_case(name, tmp_path, **depth)
    inputs = {"input_ids": torch.randint(3, VOCAB, (3, 5)), "use_cache": False}

    def run(options: dict[str, Any]) -> Tensor:
        cm: Any = case.compile(options)
        logits: Tensor = cm(**inputs, adapter_names=["a0", None, "a1"]).logits
        return logits

    assert both_ways(monkeypatch, run).replayed == [3]


@pytest.mark.slow
@pytest.mark.parametrize("cache", [transformers.DynamicCache, transformers.StaticCache])
def test_layers_that_write_into_a_cache_are_traced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Any
) -> None:
    torch.manual_seed(0)
    case = build_case("llama", tmp_path, num_hidden_layers=3)
    ids = torch.randint(3, VOCAB, (3, 5))
    room = {"max_cache_len": 8} if cache is transformers.StaticCache else {}

    def run(options: dict[str, Any]) -> list[Tensor]:
        cm: Any = case.compile(options)
        past = cache(config=cm.model.config, **room)
        return [
            cm(input_ids=given, past_key_values=past, adapter_names=["a0", None, "a1"]).logits
            for given in (ids, ids[:, :1], ids[:, 1:2])
        ]

    found = both_ways(monkeypatch, run)
    assert found.replayed == [0] * len(found.graphs)
