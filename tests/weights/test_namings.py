"""New random weights of real families, pushed under every naming."""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest
import tiny
import torch
import transformers
from expert_models import experts_modules
from namings import DENSE, EXPERTS, new_weights
from torch import nn

import lorafx

pytestmark = pytest.mark.usefixtures("fixed_sizes")

SEEDS = itertools.count(11)
NAMED = {
    "qwen3_vl_moe": "Qwen3VLMoeForConditionalGeneration",
    "step3p7": "Step3p7ForConditionalGeneration",
}


def base_of(model_type: str) -> nn.Module:
    """A tiny model; no weight of its experts is square, which could be stored either way."""
    config = tiny.shrink(transformers.CONFIG_MAPPING[model_type])
    text = config.get_text_config()
    text.moe_intermediate_size = 24
    if model_type == "step3p7":
        text.sliding_window = 8
        text.mlp_layer_types = ["dense", "sparse"]
    if model_type in ("qwen3_moe", "qwen3_vl_moe", "deepseek_v3"):
        text.num_hidden_layers, text.first_k_dense_replace = 1, 0
    torch.manual_seed(0)
    if model_type in NAMED:
        model = getattr(transformers, NAMED[model_type])(config)
    else:
        model = transformers.AutoModelForCausalLM.from_config(config)
    return model.eval().requires_grad_(False)


@pytest.fixture(
    scope="module",
    params=["qwen3_moe", "deepseek_v3", "qwen3_5_moe_text", "qwen3_vl_moe", "step3p7"],
)
def served(request: pytest.FixtureRequest) -> tuple[Any, nn.Module]:
    """A model of each family, compiled once, and its base."""
    base = base_of(request.param)
    cm = lorafx.compile(
        new_weights(base, 5), lorafx.LoraConfig(), options={"lowering": "reference"}
    )
    return cm, base


@pytest.mark.parametrize("naming", [*DENSE, *EXPERTS])
def test_round_trip(served: tuple[Any, nn.Module], naming: str) -> None:
    cm, base = served
    assert any(True for _ in experts_modules(base))
    before = {name: t.data_ptr() for name, t in cm.model.state_dict().items()}
    base = new_weights(base, next(SEEDS))
    pairs = list({**DENSE, **EXPERTS}[naming](base).items())
    random.Random(len(pairs)).shuffle(pairs)
    assert not cm.load_weights(pairs).missing
    after = cm.model.state_dict()
    for name, tensor in base.state_dict().items():
        assert torch.equal(after[name], tensor), name
    assert {name: tensor.data_ptr() for name, tensor in after.items()} == before
