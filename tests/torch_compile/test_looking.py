"""`lorafx.why` and `lorafx.profile` of models that their users compile themselves say what they say
of those that `lorafx.compile` serves."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from attached import attached, check, compiled, fresh_dynamo, graphs
from dense_merge import Case
from tiny_models import FAMILIES

import lorafx
from lorafx.errors import BatchError, ConfigError, UnknownAdapterError

__all__ = ["fresh_dynamo"]

NAMES = ["a1", None, "a3", "a0"]


@pytest.fixture
def inputs() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return FAMILIES["plain"].inputs(len(NAMES), 5)


def test_why(plain: Case, inputs: Any) -> None:
    model = attached(plain)
    call = compiled(model)
    check(call, model, plain, NAMES, inputs)
    count = graphs(model)
    cm = plain.compile()
    want = cm.why("embed", adapter="a3", inputs=inputs)
    assert want.adapter is not None
    assert want.adapter.change > 0.01
    for given in (model, call):
        told = lorafx.why(given, "embed", "a3", inputs=inputs)
        assert told.adapter == want.adapter
        assert (told.rule, told.sizes, told.adapters) == (want.rule, want.sizes, want.adapters)
    assert told.graphs[0].lora
    assert told.graphs[0].nodes
    assert graphs(model) == count
    alone = lorafx.why(model, "embed", "a3")
    assert alone.adapter is not None
    assert alone.adapter.change is None
    assert "why(..., inputs={...}) measures it" in alone.adapter.notes[-1]
    assert lorafx.why(cm, "embed", "a3", inputs=inputs) == cm.why("embed", "a3", inputs=inputs)
    with pytest.raises(UnknownAdapterError):
        lorafx.why(model, "embed", "nobody")
    with pytest.raises(ConfigError, match="lora_config is for models without it"):
        lorafx.why(model, "embed", lora_config=lorafx.LoraConfig(["up"]))
    check(call, model, plain, NAMES, inputs)


def test_a_tensor_is_not_taken_for_a_list_of_arguments(plain: Case, inputs: Any) -> None:
    model = attached(plain)
    call = compiled(model)
    (tensor,) = inputs.values()
    told = lorafx.why(model, "embed", "a3", inputs=(tensor,))
    assert told == lorafx.why(model, "embed", "a3", inputs=inputs)
    for given in (tensor, "ids", 3):
        kind = type(given).__name__
        with pytest.raises(ConfigError, match=f"also where there is one; got a {kind}"):
            lorafx.why(model, "embed", "a3", inputs=given)
        with pytest.raises(ConfigError, match=f"also where there is one; got a {kind}"):
            lorafx.profile(call, given, NAMES)
    with pytest.raises(ConfigError, match="calls = '2'"):
        lorafx.profile(call, inputs, NAMES, calls="2")
    with pytest.raises(ConfigError, match=r"int is no nn\.Module"):
        lorafx.profile(3, inputs, NAMES)


def test_why_of_a_model_without_lora(plain: Case, inputs: Any) -> None:
    told = lorafx.why(plain.base, "up", plain.folders["a1"])
    assert told.selected
    assert told.adapter is not None
    assert len(told.adapter.keys) == 2
    other = lorafx.why(plain.base, "up", lora_config=lorafx.LoraConfig(["down"]))
    assert other.rule.startswith("target_modules=['down'] does not name it")
    with pytest.raises(ConfigError, match="nothing to measure"):
        lorafx.why(plain.base, "up", inputs=inputs)
    with pytest.raises(ConfigError):
        lorafx.why("folder", "up")


def test_profile(plain: Case, inputs: Any) -> None:
    model = attached(plain)
    call = compiled(model)
    check(call, model, plain, NAMES, inputs)
    count = graphs(model)
    report = lorafx.profile(call, inputs, NAMES, calls=2)
    want = plain.compile().profile(inputs, NAMES, calls=2)
    assert [node.paths for node in report.nodes] == [node.paths for node in want.nodes]
    assert [node.floor for node in report.nodes] == [node.floor for node in want.nodes]
    assert all(node.whole > 0 for node in report.nodes)
    assert report.served > 0
    assert report.unreached == want.unreached
    check(call, model, plain, NAMES, inputs)
    assert graphs(model) == count
    with pytest.raises(ConfigError, match="is not compiled; give it what torch"):
        lorafx.profile(model, inputs, NAMES)
    with pytest.raises(ConfigError, match=r"carries no LoRA; call lorafx\.attach"):
        lorafx.profile(plain.base, inputs, NAMES)
    with pytest.raises(BatchError, match="no request of the batch has an adapter"):
        lorafx.profile(call, inputs, [None] * 4)
