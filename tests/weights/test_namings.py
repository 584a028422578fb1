"""New random weights of real families, pushed under every naming; packed projections, layers that
cut weights themselves, and a family's own conversion."""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest
import tiny
import torch
import transformers
from dense_merge import REFERENCE
from expert_models import experts_modules, moe_base
from namings import DENSE, EXPERTS, new_weights, older
from tensor_parallel import llama_config, push_weights
from torch import nn
from two_ranks import on_ranks

import lorafx
from lorafx.errors import BaseWeightsError

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
    before = {name: t.data_ptr() for name, t in cm._orig_mod.state_dict().items()}
    base = new_weights(base, next(SEEDS))
    pairs = list({**DENSE, **EXPERTS}[naming](base).items())
    random.Random(len(pairs)).shuffle(pairs)
    assert not cm.load_weights(pairs).missing
    after = cm._orig_mod.state_dict()
    for name, tensor in base.state_dict().items():
        assert torch.equal(after[name], tensor), name
    assert {name: tensor.data_ptr() for name, tensor in after.items()} == before


def test_members_whose_sizes_nobody_declared() -> None:
    sizes = {"num_hidden_layers": 1, "hidden_size": 24, "intermediate_size": 40, "vocab_size": 61}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0}
    model = transformers.Phi3ForCausalLM(transformers.Phi3Config(**sizes, **heads)).eval()
    packed = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}
    cm = lorafx.compile(model, lorafx.LoraConfig(packed_modules=packed), options=REFERENCE)
    given = {"model.layers.0.self_attn.q_proj.weight": torch.zeros(24, 24)}
    said = r"3 names are declared for .*qkv_proj, whose class gives unknown slices; .*output_sizes="
    with pytest.raises(BaseWeightsError, match=said):
        cm.load_weights(given, strict=False)


@pytest.mark.slow
def test_two_ranks_take_their_shares() -> None:
    torch.manual_seed(0)
    states = [dict(transformers.LlamaForCausalLM(llama_config()).state_dict()) for _ in range(2)]
    assert on_ranks(2, push_weights, *states, False) == [True, True]


def test_a_familys_own_conversion_goes_before_the_usual_meaning_of_a_name() -> None:
    """w13_weight has the gates first and the ups behind them, but in checkpoints of Inkling."""
    base = moe_base("inkling2_text").requires_grad_(False)
    cm = lorafx.compile(base, lorafx.LoraConfig(), options=REFERENCE)
    fresh = new_weights(base, 3)
    state = older(fresh)
    name = next(name for name in state if name.endswith("experts.w13_weight"))
    own = "model.layers.0.mlp.experts.gate_up_proj"
    assert not torch.equal(state[name], fresh.state_dict()[own])
    cm.load_weights(state)
    for own, tensor in fresh.state_dict().items():
        assert torch.equal(cm._orig_mod.state_dict()[own], tensor), own
