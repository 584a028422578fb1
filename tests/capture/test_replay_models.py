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
        logits: Tensor = cm(**inputs, adapter_names=NAMES).logits
        return logits

    assert both_ways(monkeypatch, run).replayed == [3]


#: Of four layers that write into a cache, how many are replayed in the graphs of the prompt and of
#: further tokens. What a model reads of its first layer's part before that is called is an input by
#: then, so its second one stands for the others.
CACHES: dict[str, tuple[dict[str, Any], list[int]]] = {
    "made in the call": ({"use_cache": True}, [3, 2]),
    "dynamic": ({"past_key_values": transformers.DynamicCache}, [3, 2]),
    "static": ({"past_key_values": transformers.StaticCache}, [2, 2]),
}


@pytest.mark.parametrize("kind", CACHES)
def test_layers_that_write_into_a_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    torch.manual_seed(0)
    given, counts = CACHES[kind]
    case = build_case("llama", tmp_path, num_hidden_layers=4)
    ids = torch.randint(3, VOCAB, (3, 5))

    def run(options: dict[str, Any]) -> list[Tensor]:
        cm: Any = case.compile(options)
        kwargs = dict(given)
        if cache := kwargs.get("past_key_values"):
            room = {"max_cache_len": 8} if cache is transformers.StaticCache else {}
            kwargs["past_key_values"] = cache(config=cm.model.config, **room)
        out = cm(input_ids=ids, **kwargs, adapter_names=NAMES)
        found = [out.logits]
        for place in (0, 1):
            past = out.past_key_values
            more = ids[:, place : place + 1]
            found.append(cm(input_ids=more, past_key_values=past, adapter_names=NAMES).logits)
        for layer in out.past_key_values.layers:
            found += [layer.keys, layer.values]
        return found

    assert both_ways(monkeypatch, run).replayed == counts
