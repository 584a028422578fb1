"""Keywords that choose an adapter elsewhere, or are slips for ours: refused where the model does
not declare them, on every road; all other names pass."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from attached import attached, compiled, fresh_dynamo, graphs, served  # noqa: F401  (the fixture)
from dense_merge import REFERENCE, Case
from tiny_models import token_inputs
from torch import Tensor, nn
from transformers import GenerationConfig

import lorafx
from lorafx.errors import ConfigError
from lorafx.model.keywords import ELSEWHERE, refuse_slips

pytestmark = pytest.mark.quick

SLIPS = (
    *("adapter_name", "adapter", "adapters", "lora_request", "lora_name", "names"),
    *("adapter_nmaes", "adaptor_names"),
)


@pytest.fixture(scope="module")
def cm(llama: Case) -> Any:
    return llama.compile()


@pytest.mark.parametrize("name", SLIPS)
def test_calls_of_a_compiled_model(cm: Any, name: str) -> None:
    said = rf"LlamaForCausalLM.forward has no argument '{name}'.*Give adapter_names="
    with pytest.raises(ConfigError, match=said):
        cm(**token_inputs(3, 4), **{name: ["a0", None, "a1"]})
    with pytest.raises(ConfigError, match=rf"generate has no argument '{name}'"):
        cm.generate(**token_inputs(3, 4), **{name: ["a0"]}, max_new_tokens=1)


class Swallowing(nn.Module):
    """A model whose methods take anything, and whose part declares a name of another library's."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), Scaled()

    def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
        return self.second(self.first(x), **kwargs)

    def encode(self, x: Tensor, **kwargs: Any) -> Tensor:
        return self.first(x)


class Scaled(nn.Module):
    def forward(self, x: Tensor, lora_scale: float = 1.0, **kwargs: Any) -> Tensor:
        return x * lora_scale


def test_other_methods_and_names_that_a_part_declares() -> None:
    config = lorafx.LoraConfig(target_modules=["first"], max_rank=2)
    cm = lorafx.compile(Swallowing().eval(), config, options=REFERENCE)
    x = torch.ones(2, 6)
    assert torch.equal(cm(x, lora_scale=2.0), 2 * cm(x))
    with pytest.raises(ConfigError, match=r"Swallowing.encode has no argument 'adapter_name'"):
        cm.encode(x, adapter_name="a")
    with pytest.raises(ConfigError, match=r"Swallowing.encode has no argument 'adapter_slots'"):
        cm.encode(x, adapter_slots=x)
    assert torch.equal(cm.encode(x, anything=1), cm.encode(x))


def test_marked_models(llama: Case) -> None:
    name = "adapter_names"
    model, inputs = attached(llama), token_inputs(3, 4)
    said = rf"'{name}'.*with lorafx.adapters\(model"
    with torch.no_grad(), pytest.raises(ConfigError, match=said):
        model(**inputs, **{name: ["a0", None, "a1"]})
    call, counts = compiled(model, dynamic=False), []
    for _ in range(2):
        with torch.no_grad(), pytest.raises(ConfigError, match=said):
            call(**inputs, **{name: ["a0"]})
        with pytest.raises(ConfigError, match=said):
            served(call, model, ["a0", None, "a1"], {**inputs, name: ["a0"]})
        served(call, model, ["a0", None, "a1"], inputs)
        counts.append(graphs(model))
    assert counts[0] == counts[1]


@pytest.mark.parametrize("family", ["gpt2", "t5"])
def test_what_models_declare_passes(family: str, case_of: Callable[..., Case]) -> None:
    model: Any = case_of(family).model()
    functions = [model.forward, *([model.generate] if hasattr(model, "generate") else [])]
    names = {name for function in functions for name in inspect.signature(function).parameters}
    names |= {
        *vars(GenerationConfig()),
        *("num_logits_to_keep", "logits_to_keep", "cross_attention_kwargs", "output_router_logits"),
        *("encoder_attention_mask", "cross_attn_head_mask", "assistant_model", "adapter_mask"),
    }
    refuse_slips(names, model.forward, model)
    assert not names & {*ELSEWHERE}
