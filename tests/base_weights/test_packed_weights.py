"""Packed projections in the model, in the checkpoint, or in both; layers that cut weights
themselves; experts of model authors' own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from dense_merge import Case, check_mixed
from expert_models import moe_base
from hand_made import hand_case
from namings import new_weights, older
from packed_models import MAPPING, PACKED_AS, Packed, twins
from pushed_shards import push_weights
from tensor_parallel import llama_config
from torch import Tensor, nn
from two_ranks import on_ranks

import lorafx
from lorafx.errors import BaseWeightsError
from lorafx.layers import load_weights

pytestmark = pytest.mark.usefixtures("fixed_sizes")

REFERENCE = {"lowering": "reference"}
NAMES = ["a", None, "b", "a"]
IDS = {"input_ids": torch.randint(0, 20, (4, 7), generator=torch.Generator().manual_seed(1))}
LINEARS = [f"layers.{i}.{name}" for i in range(2) for name in [*PACKED_AS, "o_proj", "down_proj"]]


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    apart, _ = twins()
    return hand_case(apart, tmp_path_factory.mktemp("apart"), a=LINEARS, b=LINEARS[1::2])


def compiled(model: nn.Module, case: Case, config: Any = None) -> Any:
    return lorafx.compile(model, config, adapters=case.folders, options=REFERENCE)


@pytest.fixture(scope="module")
def packed_served(case: Case) -> Any:
    cm = compiled(twins()[1], case)
    cm(**IDS, adapter_names=NAMES)
    return cm


@pytest.fixture(scope="module")
def apart_served(case: Case) -> Any:
    config = lorafx.LoraConfig(
        target_modules=[*PACKED_AS, "o_proj", "down_proj"], packed_modules=MAPPING
    )
    cm = compiled(twins()[0], case, config)
    cm(**IDS, adapter_names=NAMES)
    return cm


def moved(case: Case, base: nn.Module, folder: Path) -> Case:
    """The same adapters over a new base."""
    return hand_case(base, folder, a=LINEARS, b=LINEARS[1::2])


def packed_state(apart: nn.Module) -> dict[str, Tensor]:
    """The state of a model like `apart` that is packed."""
    model = Packed()
    load_weights(model, apart.state_dict())
    return dict(model.state_dict())


@pytest.mark.parametrize("packed_names", [False, True], ids=["apart", "packed"])
def test_into_a_packed_model(
    packed_served: Any, case: Case, tmp_path: Path, packed_names: bool
) -> None:
    cm = packed_served
    apart = new_weights(case.base, 3 + packed_names)
    graphs = cm.recompiles
    state = packed_state(apart) if packed_names else apart.state_dict()
    report = cm.load_weights(reversed(list(state.items())))
    assert set(report.loaded) == set(cm.model.state_dict())
    check_mixed(cm, moved(case, apart, tmp_path), NAMES, IDS)
    assert cm.recompiles == graphs


def test_packed_tensors_into_a_model_that_is_not(
    apart_served: Any, case: Case, tmp_path: Path
) -> None:
    cm = apart_served
    graphs = cm.recompiles
    apart = new_weights(case.base, 5)
    pairs = list(packed_state(apart).items())
    assert any("in_proj_qkvz" in name for name, _ in pairs)
    cm.load_weights(iter(pairs))
    check_mixed(cm, moved(case, apart, tmp_path), NAMES, IDS)
    assert cm.recompiles == graphs


@pytest.mark.parametrize("once", [False, True], ids=["list", "generator"])
def test_members_whose_sizes_nobody_declared(once: bool) -> None:
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
    cm.load_weights(reversed(given.items()) if once else given)
    assert all(torch.equal(t, want[name]) for name, t in model.state_dict().items())

    q = next(name for name in given if "q_proj" in name)
    with pytest.raises(BaseWeightsError, match="do not fill"):
        cm.load_weights({**given, q: torch.zeros(23, 24)})
    del given[q]
    with pytest.raises(BaseWeightsError, match=r"needs .*q_proj.weight too"):
        cm.load_weights(iter(given.items()) if once else given)
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
