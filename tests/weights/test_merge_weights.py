"""Which weights take ΔW: each kind of site, tied and copied ones, other dtypes and formats.

The merged model is called by itself here, in eager mode: what its weights hold is all there is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from absorbed import OneLayer, absorbed, case_of, post_process, states
from dense_merge import REFERENCE, TOLERANCE, build_case, error, random_base, valid
from expert_models import moe_case
from hand_made import SCALE, factors, save
from merging import bits, tied_case
from own_weights import own_case
from tiny_models import VOCAB, token_inputs
from torch import Tensor, nn

import lorafx
from lorafx.errors import MatchError

QV = {"target_modules": ["q_proj", "v_proj"]}


def check_merges(
    cm: Any, expected: Callable[[str], Tensor], inputs: Mapping[str, Tensor], *names: str
) -> None:
    """Each adapter, merged, gives the model the expected logits; unmerged every bit is back."""
    before = bits(cm._orig_mod)
    held = {name: p.data_ptr() for name, p in cm._orig_mod.named_parameters()}
    for name in names:
        assert cm.merge(name).error < 1e-5
        with torch.no_grad():
            got = cm._orig_mod(**inputs)["logits"]
        want = expected(name)
        assert error(valid(inputs, got), valid(inputs, want)) <= TOLERANCE
        cm.unmerge()
        with torch.no_grad():
            base = cm._orig_mod(**inputs)["logits"]
        assert error(valid(inputs, base), valid(inputs, want)) > 100 * TOLERANCE
        assert all(
            torch.equal(cm._orig_mod.state_dict()[key], value) for key, value in before.items()
        )
    assert held == {name: p.data_ptr() for name, p in cm._orig_mod.named_parameters()}
    assert all(packed.intact for packed in cm._session.program.packed)


@pytest.mark.parametrize(
    ("family", "names"),
    [
        ("gpt2", ["a0", "a2", "a4"]),
        pytest.param("llama", ["a1", "a3"], marks=pytest.mark.slow),
        pytest.param("phi3", ["a0", "a1", "a3"], marks=pytest.mark.slow),
    ],
)
def test_linears_and_embeddings(family: str, names: list[str], tmp_path: Path) -> None:
    """Packed siblings, Conv1D stored (in, out), an embedding with its head."""
    case = build_case(family, tmp_path)
    inputs = token_inputs(3, 5)
    check_merges(case.compile(), lambda name: case.expected([name] * 3, inputs), inputs, *names)


@pytest.mark.parametrize(
    "model_type", ["gpt_oss", pytest.param("qwen3_moe", marks=pytest.mark.slow)]
)
def test_routed_experts_and_routers(model_type: str, tmp_path: Path) -> None:
    """An update an expert, ranks of its own, gate and up interleaved and stored (E, in, out)."""
    case = moe_case(model_type, tmp_path)
    inputs = {"input_ids": torch.randint(3, VOCAB, (3, 5))}
    names = ("params", "down", "older")
    check_merges(case.compile(), lambda name: case.expected([name] * 3, inputs), inputs, *names)


# Tied weights
@pytest.mark.parametrize("name", ["both", "embed", "head"])
def test_a_tied_weight_cannot_hold_two_sums(name: str, tmp_path: Path) -> None:
    case = tied_case(tmp_path)
    cm = case.compile()
    before = bits(cm._orig_mod)
    with pytest.raises(MatchError, match=r"embed\.weight, head\.weight are one tensor") as caught:
        cm.merge(name)
    assert "export_merged()" in str(caught.value)
    if name != "both":  # the other end is no site
        alone = lorafx.compile(case.model(), {name: case.folders[name]}, options=REFERENCE)
        with pytest.raises(MatchError, match="are one tensor"):
            alone.merge(name)
    assert all(torch.equal(cm._orig_mod.state_dict()[key], value) for key, value in before.items())


def test_a_tied_weight_that_the_adapter_leaves_alone(tmp_path: Path) -> None:
    case = tied_case(tmp_path)
    inputs = {"input_ids": torch.randint(0, VOCAB, (2, 4))}
    cm = case.compile()
    check_merges(cm, lambda name: case.expected([name] * 2, inputs), inputs, "up")


# Weights of an adapter's own
def own_inputs() -> dict[str, Tensor]:
    """With a trained token in each row."""
    torch.manual_seed(0)
    x = token_inputs(2, 6)
    x["input_ids"][:, 3] = 5
    return x


def test_heads_embeddings_and_tokens(tmp_path: Path) -> None:
    plans = {
        "both": {"modules_to_save": ["lm_head", "embed_tokens"]},
        "tokens": {"trainable_token_indices": {"embed_tokens": [3, 5], "lm_head": [5, 40]}},
    }
    base = random_base("llama")
    case = own_case(base, tmp_path, {n: {**QV, **p} for n, p in plans.items()})
    cm = case.compile()
    x = own_inputs()
    check_merges(cm, lambda name: case.expected([name] * 2, x), x, "both", "tokens")
    cm.export_merged("both", tmp_path / "out")
    written = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        assert error(written(**x)["logits"], case.expected(["both"] * 2, x)) <= TOLERANCE


def test_a_tied_weight_with_trained_tokens(tmp_path: Path) -> None:
    """Trained tokens of both ends are one change; another head would need a tensor of its own."""
    base = random_base("llama", tie_word_embeddings=True)
    plans = {
        "tokens": {"trainable_token_indices": [3, 5]},
        "head": {"modules_to_save": ["lm_head"]},
    }
    case = own_case(base, tmp_path, {n: {**QV, **p} for n, p in plans.items()})
    cm = case.compile()
    x = own_inputs()
    check_merges(cm, lambda name: case.expected([name] * 2, x), x, "tokens")
    with pytest.raises(MatchError, match="are one tensor, but the adapter changes only lm_head"):
        cm.merge("head")


def test_a_tied_weight_whose_ends_change_unlike(tmp_path: Path) -> None:
    base = random_base("llama", tie_word_embeddings=True)
    plans = {"both": {"target_modules": ["embed_tokens", "lm_head"]}}
    cm = own_case(base, tmp_path, plans).compile()
    with pytest.raises(MatchError, match="the adapter changes each of them by another update"):
        cm.merge("both")


# What was made of a weight
def test_absorbed_weights_follow(tmp_path: Path) -> None:
    case = case_of(OneLayer, tmp_path)
    model = absorbed(case)
    cm = lorafx.compile(model, case.folders, options=REFERENCE)
    post_process(model)
    inputs = states(3, 4)
    held = [model.self_attn.w_uk.clone(), model.self_attn.w_uv.clone()]
    check_merges(cm, lambda name: case.expected([name] * 3, inputs), inputs, "a", "b", "c")
    assert torch.equal(model.self_attn.w_uk, held[0])
    assert torch.equal(model.self_attn.w_uv, held[1])


# Numbers
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_sum_is_rounded_once(dtype: torch.dtype, tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(48, 40, bias=False), nn.Linear(40, 8))
    pairs = factors(base, ["0"], rank=4, seed=3)
    model = base.eval().requires_grad_(False).to(dtype)
    folder = {"a": save(base, tmp_path, pairs)}
    cm = lorafx.compile(model, folder, options=REFERENCE)
    before = model[0].weight.clone()
    report = cm.merge("a")
    a, b = (factor.to(dtype).double() for factor in pairs["0"])
    exact = before.double() + SCALE * (b @ a)
    eps = torch.finfo(dtype).eps
    # Half a unit in the last place, and what float32 sums may add where that is a tie.
    limit = exact.abs() * eps / 2 * 1.01 + 1e-6 * (dtype != torch.float64)
    assert ((model[0].weight.double() - exact).abs() <= limit).all()
    update = (SCALE * (b @ a)).norm()
    lost = float((model[0].weight.double() - exact).norm() / update)
    assert report.error == pytest.approx(lost, rel=0.01, abs=1e-6)
    cm.unmerge()
    assert torch.equal(model[0].weight, before)


# Quantised weights
def bitsandbytes_nf4(model: nn.Module) -> nn.Module:
    bnb = pytest.importorskip("bitsandbytes").nn
    for name, child in list(model.named_children()):
        linear = bnb.Linear4bit(
            child.in_features, child.out_features, bias=False, compute_dtype=torch.float32
        )
        linear.weight = bnb.Params4bit(child.weight.data, requires_grad=False, quant_type="nf4")
        setattr(model, name, linear)
    return model.to("cpu")


def test_formats_of_libraries(tmp_path: Path) -> None:
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False)).eval()
    pairs = factors(dense, ["0"], rank=3, seed=1, gain=2)
    folder = save(dense, tmp_path, pairs)
    model = bitsandbytes_nf4(dense).requires_grad_(False)
    cm = lorafx.compile(model, {"a": folder}, options=REFERENCE)
    x = torch.randn(3, 64)
    base = model(x).clone()
    before = lorafx.dequantize(model[0]).clone()
    with pytest.raises(MatchError, match="requantize=True"):
        cm.merge("a")
    report = cm.merge("a", requantize=True)
    a, b = pairs["0"]
    update = SCALE * (b @ a)
    lost = float((lorafx.dequantize(model[0]) - before - update).norm() / update.norm())
    assert lost < 0.2
    assert report.error == pytest.approx(lost, rel=0.05)
    merged = model(x)
    assert (merged - base).norm() > 0.1 * base.norm()
    assert torch.equal(cm(x, adapter_names=["a"] * 3), merged)
    cm.unmerge()
    assert torch.equal(model(x), base)
    with pytest.raises(MatchError, match="0: its weight is quantised"):
        cm.export_merged("a", tmp_path / "out")
