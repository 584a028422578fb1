"""Packed projections, layers that cut weights themselves, and a family's own conversion."""

from __future__ import annotations

import pytest
import torch
import transformers
from dense_merge import REFERENCE
from expert_models import moe_base
from namings import new_weights, older
from tensor_parallel import llama_config, push_weights
from two_ranks import on_ranks

import lorafx
from lorafx.errors import BaseWeightsError

pytestmark = pytest.mark.usefixtures("fixed_sizes")


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
        assert torch.equal(cm.model.state_dict()[own], tensor), own
