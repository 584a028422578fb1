"""Mixture-of-experts models of transformers: adapters of both naming generations on experts,
routers, shared experts and every linear, mixed in one batch, against dense merge.

PEFT's own conversion of the older names is silently wrong for deepseek_v3, glm4_moe, qwen2_moe and
qwen3_next. It is no oracle here: W + ΔW is added up expert by expert.
"""

from __future__ import annotations

import copy
from pathlib import Path

import oracle
import pytest
import tiny
import torch
from dense_merge import REFERENCE, check_mixed
from expert_models import MIXED, experts_modules, ids, moe_case, router_names
from tiny_inputs import inputs
from transformers.integrations import use_experts_implementation
from transformers.models.step3p7 import modeling_step3p7

import lorafx
from lorafx.errors import MatchError

#: Model type -> packs that `explain` shows, by last names. Qwen3-MoE is in test_qwen3_moe.
MODELS = {
    "mixtral": ["q_proj, k_proj, v_proj"],
    "olmoe": ["q_proj, k_proj, v_proj"],
    "deepseek_v3": ["q_a_proj, kv_a_proj_with_mqa", "gate_proj, up_proj"],
    "glm4_moe": ["q_proj, k_proj, v_proj", "gate_proj, up_proj"],
    "gpt_oss": ["q_proj, k_proj, v_proj"],
    "llama4": ["q_proj, k_proj, v_proj", "gate_proj, up_proj"],
    "granitemoe": ["q_proj, k_proj, v_proj"],
    "qwen2_moe": ["q_proj, k_proj, v_proj", "gate_proj, up_proj"],
    "qwen3_next": ["in_proj_qkvz, in_proj_ba", "q_proj, k_proj, v_proj", "gate_proj, up_proj"],
    "qwen3_vl_moe": ["q_proj, k_proj, v_proj"],
}


#: Captured for any sizes; the others, whose layers differ in less, for the sizes that they are
#: given. Qwen2-MoE's any sizes are in tests/conformance.
ANY_SIZES = ("deepseek_v3", "llama4")

#: In `make test`: a plain model, transposed weights with biases, linear attention.
QUICK = ("mixtral", "gpt_oss", "qwen3_next")


@pytest.mark.parametrize(
    "model_type", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in MODELS]
)
def test_mixed_batches(model_type: str, tmp_path: Path) -> None:
    case = moe_case(model_type, tmp_path)
    cm = case.compile(dynamic=model_type in ANY_SIZES)
    paths = {site.path for site in cm.sites}
    for path, _ in experts_modules(case.base):
        assert {f"{path}.gate_up_proj", f"{path}.down_proj"} <= paths
    routers = router_names(case.base)
    assert routers
    assert {*routers, *oracle.linears(case.base)} <= paths
    check_mixed(cm, case, MIXED, ids())
    graphs = cm.recompiles
    # The same graph for other tokens, adapters in other slots, and so other counts an expert.
    check_mixed(cm, case, ["older", "down", "params", None, "older"], ids(seed=2))
    assert cm.recompiles == graphs
    told = str(cm.explain())
    for pack in MODELS[model_type]:
        assert f"[{pack}]" in told, told
    assert "refused" not in told


@pytest.mark.slow
def test_a_class_without_the_switch_is_refused_until_it_is_given_one(tmp_path: Path) -> None:
    """Step3p7 runs its experts one after another; the refusal names a way out, which works."""
    config = tiny.shrink(
        modeling_step3p7.Step3p7TextConfig,
        num_hidden_layers=1,
        layer_types=["full_attention"],
        mlp_layer_types=["sparse"],
        sliding_window=4,
    )
    torch.manual_seed(0)
    base = modeling_step3p7.Step3p7TextModel(config).eval().requires_grad_(False)
    tiny.randomise(base)
    path, experts = next(experts_modules(base))
    every = {"target_parameters": [f"{path}.gate_up_proj", f"{path}.down_proj"]}
    folder = oracle.save_adapter(base, tmp_path, rank=3, targets=[], **every)
    reference = oracle.Oracle.of(base, {"a": folder})
    names, batch = ["a", None, "a"], inputs(base, "causal", 3, 5, padding=False)
    refused = lorafx.compile(copy.deepcopy(base), {"a": folder}, options=REFERENCE, dynamic=False)
    with pytest.raises(MatchError, match=r"(?s)layers.0.mlp.experts.*use_experts_implementation"):
        refused(**batch, adapter_names=names)

    @use_experts_implementation
    class Switched(modeling_step3p7.Step3p7Experts):
        pass

    switched = Switched(config)
    switched.load_state_dict(experts.state_dict())
    base.set_submodule(path, switched.requires_grad_(False))
    config._experts_implementation = "grouped_mm"
    cm = lorafx.compile(base, {"a": folder}, options=REFERENCE, dynamic=False)
    oracle.assert_close(cm(**batch, adapter_names=names), reference.rows(names, batch))
