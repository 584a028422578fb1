"""Mixture-of-experts models of transformers: adapters of both naming generations on experts,
routers, shared experts and every linear, mixed in one batch, against dense merge.

PEFT's own conversion of the older names is silently wrong for deepseek_v3, glm4_moe, qwen2_moe and
qwen3_next. It is no oracle here: W + ΔW is added up expert by expert.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from pathlib import Path

import oracle
import pytest
import tiny
import torch
from dense_merge import REFERENCE, Case, check_mixed
from expert_models import (
    MIXED,
    SCALE,
    Pair,
    Projection,
    experts_modules,
    ids,
    merged_pairs,
    moe_base,
    moe_case,
    pairs_of,
    router_names,
    save_older,
    write,
)
from tiny_inputs import inputs
from transformers.integrations import use_experts_implementation
from transformers.models.step3p7 import modeling_step3p7

import lorafx
from lorafx.errors import MatchError

pytestmark = pytest.mark.any_sizes

Pairs = Mapping[Projection, Pair]
#: The names of halves in Mixtral.
WORDS = {"gate": "w1", "up": "w3", "all": "w2"}

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

#: In `make test`: transposed weights with biases. tests/models/test_qwen3_moe.py has a plain model.
QUICK = ("gpt_oss",)


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


def test_every_layout_in_one_batch(tmp_path: Path) -> None:
    """Adapters with one A of gate and up and one B of down for all experts, as four libraries lay
    them out; one with a pair for each expert; one of PEFT; a base row."""
    base = moe_base("mixtral")
    ((path, _),) = experts_modules(base)
    case = Case(base, {})
    for seed, layout in enumerate(("tinker", "bridge", "stacked", "apart")):
        pairs = pairs_of(base, lambda expert, name: 2, seed=seed)
        a = {where.half: pair[0] for where, pair in pairs.items() if where.expert == 0}
        b = pairs[Projection(f"{path}.down_proj", 0, "all")][1]
        if layout == "stacked":  # gate and up have one A, and are one parameter
            a["up"] = a["gate"]
        for where, pair in list(pairs.items()) if layout != "apart" else ():
            down = where.half == "all"
            pairs[where] = (pair[0], b) if down else (a[where.half], pair[1])
        case.merged[layout] = merged_pairs(base, pairs)
        case.folders[layout] = LAYOUTS[layout](tmp_path / layout, path, pairs)
    case.folders["peft"] = oracle.save_adapter(
        base,
        tmp_path / "peft",
        rank=3,
        targets=[],
        seed=9,
        target_parameters=["experts.gate_up_proj", "experts.down_proj"],
    )
    cm = case.compile(dynamic=False)
    names = ["tinker", "bridge", None, "stacked", "apart", "peft"]
    check_mixed(cm, case, names, ids(len(names)))
    graphs = cm.recompiles
    check_mixed(cm, case, names[::-1], ids(len(names), seed=2))
    assert cm.recompiles == graphs


def _halves(path: str, pairs: Pairs) -> Iterator[tuple[str, list[Pair]]]:
    """(half, the pairs of its experts in order)."""
    for parameter, half in (("gate_up_proj", "gate"), ("gate_up_proj", "up"), ("down_proj", "all")):
        places = (Projection(f"{path}.{parameter}", e, half) for e in range(len(pairs) // 3))
        yield half, [pairs[place] for place in places]


def save_tinker(folder: Path, path: str, pairs: Pairs) -> Path:
    """w1, w3, w2: the shared factor is (1, ...), the others (E, ...); as SGLang reads them."""
    tensors = {}
    for half, items in _halves(path, pairs):
        name = f"{path}.{WORDS[half]}"
        a, b = (torch.stack(factors) for factors in zip(*items, strict=True))
        a, b = (a, b[:1]) if half == "all" else (a[:1], b)
        tensors |= {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}
    return write(folder, tensors, r=2, lora_alpha=2 * SCALE)


def save_bridge(folder: Path, path: str, pairs: Pairs) -> Path:
    """As Megatron-Bridge: the shared factor has no number, the others are of single experts."""
    tensors = {}
    for half, items in _halves(path, pairs):
        name, shared = ("down_proj", "B") if half == "all" else (f"{half}_proj", "A")
        for expert, pair in enumerate(items):
            for letter, factor in zip("AB", pair, strict=True):
                if letter == shared:
                    tensors[f"{path}.{name}.lora_{letter}.weight"] = factor[None]
                else:
                    tensors[f"{path}.{expert}.{name}.lora_{letter}.weight"] = factor
    return write(folder, tensors, r=2, lora_alpha=2 * SCALE)


def save_stacked(folder: Path, path: str, pairs: Pairs) -> Path:
    """A (E, r, K) and B (N, r, E) under the names of PEFT's wrappers, as vLLM reads them."""
    gate, up, down = (items for _, items in _halves(path, pairs))
    tensors = {}
    both = [(a, torch.cat([b, b_up])) for (a, b), (_, b_up) in zip(gate, up, strict=True)]
    for name, items in ((f"{path}.base_layer", both), (path, down)):
        tensors[f"{name}.lora_A.weight"] = torch.stack([a for a, _ in items])
        tensors[f"{name}.lora_B.weight"] = torch.stack([b for _, b in items], dim=-1)
    return write(folder, tensors, r=2, lora_alpha=2 * SCALE)


#: Writers of the same factors in a library's layout.
LAYOUTS = {
    "tinker": save_tinker,
    "bridge": save_bridge,
    "stacked": save_stacked,
    "apart": lambda folder, path, pairs: save_older(folder, pairs),
}


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
