"""Packed projections, layers that cut weights themselves, and a family's own conversion."""

from __future__ import annotations

import pytest
import torch
import transformers
from expert_models import moe_base
from namings import new_weights, older
from tensor_parallel import llama_config, push_weights
from two_ranks import on_ranks

import lorafx
from lorafx.errors import BaseWeightsError

pytestmark = pytest.mark.usefixtures("fixed_sizes")

REFERENCE = {"lowering": "reference"}


def test_members_whose_sizes_nobody_declared() -> None:
    sizes = {"num_hidden_layers": 1, "hidden_size": 24, "intermediate_size": 40, "vocab_size": 61}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0}
    model = transformers.Phi3ForCausalLM(transformers.Phi3Config(**sizes, **heads)).eval()
    packed = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
    cm = lorafx.compile(model, lorafx.LoraConfig(packed_modules=packed), options=REFERENCE)
    want = {name: torch.randn_like(t) for name, t in model.state_dict().items()}
    given = {}
    for name, tensor in want.items():
        if "qkv_proj" in name:
            parts = zip("qkv", tensor.split([24, 12, 12]), strict=True)
            given.update({name.replace("qkv", letter): part for letter, part in parts})
        elif "gate_up" in name:
            parts = zip(("gate", "up"), tensor.chunk(2), strict=True)
            given.update({name.replace("gate_up", half): part for half, part in parts})
        else:
            given[name] = tensor
    cm.load_weights(reversed(given.items()))
    assert all(torch.equal(t, want[name]) for name, t in model.state_dict().items())

    q = next(name for name in given if "q_proj" in name)
    with pytest.raises(BaseWeightsError, match="do not fill"):
        cm.load_weights({**given, q: torch.zeros(23, 24)})
    del given[q]
    with pytest.raises(BaseWeightsError, match=r"needs .*q_proj.weight too"):
        cm.load_weights(given)
    assert all(torch.equal(t, want[name]) for name, t in model.state_dict().items())


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
