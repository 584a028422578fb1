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

NAMES = ["a0", None, "a1"]


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("llama", {}),
        *(
            pytest.param(name, sizes, marks=pytest.mark.slow)
            for name, sizes in {
                "qwen3": {},
                "gemma3": {
                    "num_hidden_layers": 4,
                    "layer_types": ["sliding_attention", "full_attention"] * 2,
                },
                "gpt2": {"n_layer": 3},
                "phi3": {},
            }.items()
        ),
    ],
)
def test_layers_of_transformers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, sizes: dict[str, Any]
) -> None:
    torch.manual_seed(0)
    depth = sizes if "n_layer" in sizes else {"num_hidden_layers": 3, **sizes}
    case = build_case(name, tmp_path, **depth)
    inputs = {"input_ids": torch.randint(3, VOCAB, (3, 5)), "use_cache": False}

    def run(options: dict[str, Any]) -> Tensor:
        # Sizes are symbols in the tests below.
        cm: Any = case.compile(options, dynamic=False)
        logits: Tensor = cm(**inputs, adapter_names=NAMES).logits
        return logits

    assert both_ways(monkeypatch, run).replayed == [depth.get("num_hidden_layers", 3) - 1]


IDS = torch.tensor([[7, 40, 12, 3, 58], [9, 9, 31, 22, 4], [60, 5, 17, 17, 36]])


def step(cm: Any, past: Any, place: int) -> Tensor:
    more = IDS[:, place : place + 1]
    logits: Tensor = cm(input_ids=more, past_key_values=past, adapter_names=NAMES).logits
    return logits


def written(cache: Any) -> list[Tensor]:
    return [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]


# Of three layers that write into a cache, how many are replayed in the graphs of the prompt and of
# further tokens. Where a model reads of its first layer's part before that is called, that part is
# an input by then, so its second one stands for the others.


def test_layers_that_write_into_a_cache_that_grows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cache that the call makes, and one that is given: steps with either are one graph."""
    case = build_case("llama", tmp_path, num_hidden_layers=3)

    def run(options: dict[str, Any]) -> list[Tensor]:
        cm: Any = case.compile(options)
        made = cm(input_ids=IDS, use_cache=True, adapter_names=NAMES)
        found = [made.logits, *(step(cm, made.past_key_values, place) for place in (0, 1))]
        cache = transformers.DynamicCache(config=cm.model.config)
        found.append(cm(input_ids=IDS, past_key_values=cache, adapter_names=NAMES).logits)
        found += [step(cm, cache, place) for place in (0, 1)]
        return found + written(made.past_key_values) + written(cache)

    assert both_ways(monkeypatch, run).replayed == [2, 1, 2]


@pytest.mark.parametrize("dynamic", [False, True])
def test_layers_that_write_into_a_static_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dynamic: bool
) -> None:
    case = build_case("llama", tmp_path, num_hidden_layers=3)

    def run(options: dict[str, Any]) -> list[Tensor]:
        cm: Any = case.compile(options, dynamic=dynamic)
        cache = transformers.StaticCache(config=cm.model.config, max_cache_len=8)
        out = cm(input_ids=IDS, past_key_values=cache, adapter_names=NAMES)
        return [out.logits, *(step(cm, cache, place) for place in (0, 1)), *written(cache)]

    assert both_ways(monkeypatch, run).replayed == ([1, 1] if dynamic else [2, 1])
