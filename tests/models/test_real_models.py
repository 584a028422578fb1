"""Models that LoRA servers needed special cases for: every linear, routers too, rows mixed.

DeepSeek's q_a/kv_a and Qwen's in_proj_* are siblings like any others: `pack` finds them by itself.
Routers (`*TopKRouter`) hold a raw weight and return tuples. Models with LoRA on their routed
experts as well are in test_expert_models.
"""

from __future__ import annotations

from pathlib import Path

import oracle
import pytest
import tiny
import torch
from dense_merge import Case, check_mixed
from hand_made import factors, merged, save
from tiny_configs import VOCAB
from torch import nn

#: Model type -> packs that `explain` shows, by last names.
MODELS = {
    "deepseek_v32": ["q_a_proj, kv_a_proj_with_mqa"],
    "qwen3_5_text": ["in_proj_qkv, in_proj_z, in_proj_b, in_proj_a", "q_proj, k_proj, v_proj"],
    "qwen3_next": ["in_proj_qkvz, in_proj_ba", "gate_proj, up_proj"],
}
WITH_ROUTERS = ("deepseek_v32", "qwen3_next")


def routers(model: nn.Module) -> list[str]:
    """Modules that are no linears and multiply by a 2-D weight of their own: one a MoE layer."""
    return [
        path
        for path, module in model.named_modules()
        if not isinstance(module, (nn.Linear, nn.Embedding))
        and isinstance(module._parameters.get("weight"), nn.Parameter)
        and module._parameters["weight"].dim() == 2
    ]


def case_of(model_type: str, folder: Path) -> Case:
    """Four adapters of unequal ranks: three by PEFT, and one by hand that has the routers too."""
    family = next(f for f in tiny.families("causal") if f.model_type == model_type)
    base = tiny.build(family)
    linears = oracle.linears(base)
    case = Case(base, {})
    for rank, (name, targets) in enumerate(
        {"all": linears, "odd": linears[1::2], "even": linears[::2]}.items(), start=2
    ):
        case.folders[name] = oracle.save_adapter(base, folder / name, rank=rank, targets=targets)
    pairs = factors(base, [*routers(base), *linears], rank=5, seed=9, gain=0.3)
    case.folders["routed"] = save(base, folder / "routed", pairs)
    case.merged["routed"] = merged(base, pairs)
    return case


@pytest.mark.parametrize(
    "model_type",
    ["qwen3_next", *(pytest.param(n, marks=pytest.mark.slow) for n in list(MODELS)[:2])],
)
def test_every_linear_of(model_type: str, tmp_path: Path) -> None:
    case = case_of(model_type, tmp_path)
    assert bool(routers(case.base)) == (model_type in WITH_ROUTERS)
    # Layers of the third are those of the other two, for any sizes.
    cm = case.compile(dynamic=model_type != "qwen3_next")
    names = ["all", "routed", None, "odd", "even", "routed"]
    inputs = {"input_ids": torch.randint(3, VOCAB, (len(names), 7))}
    check_mixed(cm, case, names, inputs)
    graphs = cm.recompiles
    check_mixed(cm, case, ["routed", None, "even", "all", "odd", None], inputs)
    assert cm.recompiles == graphs
    told = str(cm.explain())
    for pack in MODELS[model_type]:
        assert f"[{pack}]" in told, told
    assert "refused" not in told
