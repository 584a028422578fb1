"""Repeated layers of models, outlined: the same results, one body a kind of layer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from dense_merge import build_case, check_mixed
from tiny_models import FAMILIES, token_inputs

from lorafx.capture.record import GraphRecord

OFF = {"passes": {"outline": False}}
NAMES = ["a0", None, "a1", "a2"]
LAYERS = 2


def record(cm: Any, index: int = 0) -> GraphRecord:
    return cm._session.backend.records[index]


def repeats(cm: Any, index: int = 0) -> list[tuple[str, ...]]:
    return [told.paths for told in record(cm, index).outlined]


def test_layers_are_one_and_the_results_are_the_same(tmp_path):
    """With the pass and without it."""
    torch.manual_seed(0)
    inputs = token_inputs(4, 6)
    case = build_case("llama", tmp_path, num_hidden_layers=LAYERS)
    cm, off = case.compile(), case.compile(OFF)
    check_mixed(cm, case, NAMES, inputs)
    assert repeats(cm) == [tuple(f"model.layers.{index}" for index in range(LAYERS))]
    got, want = (each(**inputs, adapter_names=NAMES).logits for each in (cm, off))
    assert torch.equal(got, want)
    assert record(off).outlined == []
    line = "outline: model.layers.0 and 1 more like it as one"
    assert line in str(cm.explain())
    assert "like it as one" not in str(off.explain())


@pytest.mark.slow
def test_two_kinds_of_layer_are_two_bodies(tmp_path):
    """Gemma's layers alternate between a window and the whole sequence."""
    torch.manual_seed(0)
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    case = build_case("gemma3", tmp_path, num_hidden_layers=3, layer_types=kinds)
    cm = case.compile()
    check_mixed(cm, case, NAMES, FAMILIES["gemma3"].inputs(4, 7))
    assert repeats(cm) == [("model.layers.0", "model.layers.2")]
