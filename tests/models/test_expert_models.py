"""Mixture-of-experts models of transformers: adapters of both naming generations on experts,
routers, shared experts and every linear, mixed in one batch, against dense merge.

PEFT's own conversion of the older names is silently wrong for deepseek_v3, glm4_moe, qwen2_moe and
qwen3_next. It is no oracle here: W + ΔW is added up expert by expert.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
from dense_merge import REFERENCE, check_mixed, error
from expert_models import (
    MIXED,
    experts_modules,
    ids,
    moe_base,
    moe_case,
    router_names,
)
from torch import Tensor, nn

import lorafx

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
    "qwen3_next": ["q_proj, k_proj, v_proj", "gate_proj, up_proj"],
    "qwen3_vl_moe": ["q_proj, k_proj, v_proj"],
}


#: Captured for any sizes; the others, whose layers differ in less, for the sizes that they are
#: given. Qwen2-MoE's any sizes are in tests/conformance.
ANY_SIZES = ("deepseek_v3", "llama4")

#: In `make test`: a plain model, transposed weights with biases, shared experts.
QUICK = ("mixtral", "gpt_oss", "qwen2_moe")


@pytest.mark.parametrize(
    "model_type",
    [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in MODELS],
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


@pytest.mark.parametrize(
    "model_type", ["qwen3_moe", pytest.param("gpt_oss", marks=pytest.mark.slow)]
)
def test_bfloat16_is_as_near_to_fp64_as_the_merged_model_in_bfloat16(
    model_type: str, tmp_path: Path
) -> None:
    """The bound is measured: twice the error that running W + ΔW densely in bf16 has against fp64.

    A token that goes to another expert is another function, not an error: tokens are left out whose
    router hardly prefers one expert to the next. Hardly is four times what bf16 makes of the
    logits. With one layer no other token sees what became of such a token.
    """
    case = moe_case(model_type, tmp_path, moe_base(model_type).bfloat16().float())
    (router,) = router_names(case.base)
    model = case.model().bfloat16()
    cm = lorafx.compile(model, case.folders, options=REFERENCE, dynamic=False)
    inputs = ids(5, 16)
    got = cm(**inputs, adapter_names=MIXED).logits
    assert got.dtype == torch.bfloat16
    kept = 0
    for row, name in enumerate(MIXED):
        one = oracle.one_row(inputs, row)
        merged = case.alone(name)
        dense, dense_ways = _with_ways(copy.deepcopy(merged).bfloat16(), router, one)
        exact = copy.deepcopy(merged).double()
        exact.set_experts_implementation("eager")  # grouped products do not come in fp64
        true, ways = _with_ways(exact, router, one)
        best = ways.sort(descending=True).values
        margin = best[:, 1] - best[:, 2]  # two experts a token
        sure = margin > 4 * (dense_ways - ways).abs().max()
        kept += int(sure.sum())
        assert error(got[row, sure], true[sure]) <= 2 * error(dense[sure], true[sure])
    assert kept >= 0.75 * got[..., 0].numel()


def _with_ways(model: nn.Module, router: str, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """(tokens, vocabulary) logits of one request, and (tokens, E) those of its router."""
    seen: list[Tensor] = []

    def note(module: nn.Module, args: Any, output: Any) -> None:
        seen.append(output[0].double())

    model.get_submodule(router).register_forward_hook(note)
    with torch.no_grad():
        logits = model(**inputs).logits[0]
    return logits, seen[0]
