"""Files of other methods that cannot be meant: an error names key, shape and site, and nothing has
changed."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from dense_merge import random_base
from method_files import CONFIGS, save
from safetensors.torch import load_file
from torch import Tensor, nn

import lorafx
from lorafx.adapter_store.checkpoint import load_state
from lorafx.adapter_store.peft_reader import read_adapter
from lorafx.errors import CheckpointError, LorafxError, UnsupportedAdapterError
from lorafx.runtime.marking import build_sites

LOHA = {"peft_type": "LOHA", "r": 2, "alpha": 4, "target_modules": ["q_proj"]}
LOKR = {**LOHA, "peft_type": "LOKR"}
ADALORA = {"peft_type": "ADALORA", "init_r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
MISS = {"peft_type": "MISS", "r": 2, "target_modules": ["q_proj"]}
VBLORA = {"peft_type": "VBLORA", "r": 1, "topk": 2, "target_modules": ["q_proj"]}
TINY = {"peft_type": "TINYLORA", "r": 2, "target_modules": ["q_proj"]}
AT = "base_model.model.q_proj."
ones = torch.ones


def loha(**changed: Tensor | None) -> dict[str, Tensor]:
    w = {f"hada_w{i}_{x}": ones(*s) for i in "12" for x, s in (("a", (10, 2)), ("b", (2, 12)))}
    return {f"{AT}{k}": t for k, t in {**w, **changed}.items() if t is not None}


def lokr(**changed: Tensor | None) -> dict[str, Tensor]:
    w = {"lokr_w1": ones(2, 2), "lokr_w2_a": ones(5, 2), "lokr_w2_b": ones(2, 6)}
    return {f"{AT}{k}": t for k, t in {**w, **changed}.items() if t is not None}


WHOLE = {f"{AT}lokr_w1": ones(2, 2), f"{AT}lokr_w2": ones(5, 6)}


def tiny(**changed: Tensor | None) -> dict[str, Tensor]:
    w = {"tinylora_A": ones(2, 12), "tinylora_B": ones(10, 2), "tinylora_P": ones(3, 2, 2)}
    named = {f"{AT}{k}": t for k, t in {**w, **changed}.items() if t is not None}
    return {**named, "base_model.tinylora_v.0": ones(3)}


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(12, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.q_proj(x)


@pytest.fixture(scope="module")
def cm() -> Any:
    config = lorafx.LoraConfig(target_modules=["q_proj"], max_rank=8)
    return lorafx.compile(Small().eval(), config)


NAN = ones(10, 2)
NAN[3, 1] = torch.nan
TOPK = {
    f"{AT}vblora_logits_A_topk_indices": torch.full((1, 3, 2), 9),
    f"{AT}vblora_logits_A_topk_weights": ones(1, 3, 1),
    f"{AT}vblora_logits_B": ones(5, 1, 4),
    "base_model.vblora_vector_bank": ones(4, 4),
}
CASES: dict[str, tuple[dict[str, Any] | None, dict[str, Tensor], str]] = {
    "half": (LOHA, loha(hada_w2_a=None), r"q_proj has no hada_w2_a, which belongs to .*hada_w1_a"),
    "shape": (LOHA, loha(hada_w2_b=ones(3, 12)), r"q_proj.hada_w2_b has shape \(3, 12\), it needs"),
    "sizes": (LOHA, loha(hada_w1_b=ones(2, 9)), r"hada_w2_b has shape \(2, 12\), it needs \(.*9"),
    "dims": (LOHA, loha(hada_w1_b=ones(12)), r"hada_w1_b has shape \(12,\)"),
    "nan": (LOHA, loha(hada_w1_a=NAN), r"q_proj.hada_w1_a holds 1 NaN"),
    "integers": (LOHA, loha(hada_w1_a=NAN.nan_to_num().int()), r"hada_w1_a is torch.int32"),
    "alpha": ({**LOHA, "alpha": 0}, loha(), r"alpha .*q_proj is 0"),
    "alpha tensor": (None, loha(alpha=torch.tensor(0.0)), r"q_proj.alpha .*is 0"),
    "alpha nan": (None, loha(alpha=torch.tensor(torch.nan)), r"q_proj.alpha must be one finite"),
    "alpha missing": (None, loha(), r"without α"),
    "rank": ({**LOHA, "r": 3}, loha(), r"q_proj has rank 2, adapter_config.json says 3"),
    "site": (LOHA, loha(hada_w1_a=ones(9, 2), hada_w2_a=ones(9, 2)), r"q_proj.hada_w1_a \(9, 2\)"),
    "product": (
        LOKR,
        lokr(lokr_w1=ones(2, 3)),
        r"q_proj.lokr_w1 \(2, 3\).*\(4, 18\), q_proj needs",
    ),
    "rows": (LOKR, lokr(lokr_w2_a=ones(4, 2)), r"lokr_w2_a \(4, 2\).*\(8, 4\), q_proj needs"),
    "ranks": (
        LOKR,
        lokr(lokr_w1=None, lokr_w1_a=ones(2, 3), lokr_w1_b=ones(3, 2)),
        r"lokr_w2_a has shape \(5, 2\), it needs \(.*, 3\)",
    ),
    "variant": (
        {"peft_type": "ROAD", "variant": [1], "target_modules": ["q_proj"]},
        {f"{AT}road_theta": ones(5), f"{AT}road_alpha": ones(5)},
        r"q_proj: variant = \[1\] is none of road_1, road_2, road_4; merge it",
    ),
    "wavelet": (
        {"peft_type": "WAVEFT", "wavelet_family": "sym3", "target_modules": ["q_proj"]},
        {f"{AT}waveft_spectrum": ones(5)},
        r"wavelet_family = 'sym3' is none of db1; merge it",
    ),
    "projection": (
        {"peft_type": "VERA", "r": 2, "target_modules": ["q_proj"]},
        {f"{AT}vera_lambda_d": ones(2), f"{AT}vera_lambda_b": ones(10)},
        r"no vera_A.*save_projection=True",
    ),
    "w2 twice": (LOKR, lokr(lokr_w2_b=None), r"q_proj has no lokr_w2_b"),
    "no alpha of E": (ADALORA, {f"{AT}lora_E": ones(2, 1)}, r"q_proj has no lora_A"),
    "E": (
        ADALORA,
        {f"{AT}lora_A": ones(2, 12), f"{AT}lora_B": ones(10, 2), f"{AT}lora_E": ones(2, 2)},
        r"q_proj.lora_E has shape \(2, 2\), it needs \(2, 1\)",
    ),
    "of AdaLoRA alone": (
        None,
        {f"{AT}lora_A": ones(2, 12), f"{AT}lora_B": ones(10, 2), f"{AT}lora_E": ones(2, 1)},
        r"q_proj is of AdaLoRA, .*adapter_config.json",
    ),
    "endless": (
        {"peft_type": "OFT", "num_cayley_neumann_terms": 10**9, "target_modules": ["q_proj"]},
        {f"{AT}oft_R.weight": ones(3, 6)},
        r"num_cayley_neumann_terms must be an integer from 1 to 1000",
    ),
    "two methods": (
        None,
        loha(lokr_w1=ones(2, 2), lokr_w2=ones(5, 6), alpha=ones(1)),
        r"q_proj has lokr_w1, lokr_w2, which mean nothing beside .*hada_w1_a.*; keep one",
    ),
    "beside lora_up": (
        None,
        {**WHOLE, f"{AT}lora_up.weight": ones(10, 2)},
        r"q_proj.lora_up.weight stands beside .*q_proj.lokr_w1 \(2, 2\).*; keep one",
    ),
    "product of whole matrices": (
        None,
        {**WHOLE, f"{AT}lokr_w1": ones(2, 3)},
        r"lokr_w1 \(2, 3\).* q_proj has a weight of \(10, 12\), which needs to be \(10, 18\)",
    ),
    "nothing": (LOHA, {f"{AT}lora_A.weight": ones(2, 12)}, r"holds nothing of LoHa"),
    "block": (MISS, {f"{AT}miss_block": ones(2, 9)}, r"miss_block \(2, 9\).*q_proj needs \(10"),
    "bank": (VBLORA, TOPK, r"logits_A_topk_indices points outside of the 4"),
    "too few weights": (
        VBLORA,
        {**TOPK, f"{AT}vblora_logits_A_topk_indices": torch.zeros(1, 3, 3, dtype=torch.int64)},
        r"logits_A_topk_weights has shape \(1, 3, 1\), it needs \(1, 3, 2\)",
    ),
    "rank of a block": (MISS, {f"{AT}miss_block": ones(1, 10)}, r"rank 1, .* says 2 there"),
    "negative": (
        VBLORA,
        {
            **TOPK,
            f"{AT}vblora_logits_A_topk_indices": torch.zeros(1, 3, 2, dtype=torch.int64),
            f"{AT}vblora_logits_A_topk_weights": -ones(1, 3, 1),
        },
        r"logits_A_topk_weights has negative numbers",
    ),
    "no indices": (
        {"peft_type": "UNILORA", "r": 1, "target_modules": ["q_proj"]},
        {"base_model.unilora_theta_d": ones(9)},
        r"holds nothing of UniLoRA.*save_indices=True",
    ),
    "half of a block": (
        MISS,
        {f"{AT}miss_block": ones(2, 5)},
        r"miss_block \(2, 5\).*q_proj needs",
    ),
    "w1 twice": (
        LOKR,
        lokr(lokr_w1_a=ones(2, 2), lokr_w1_b=ones(2, 2)),
        r"q_proj has lokr_w1_a, lokr_w1_b, which mean nothing beside lokr_w1,",
    ),
    "no r": (
        {k: v for k, v in LOKR.items() if k != "r"},
        {f"{AT}lokr_w1": ones(1, 2), f"{AT}lokr_w2": ones(10, 6)},
        r"q_proj has whole matrices, .* depends on r",
    ),
    "LoRA elsewhere": (
        LOHA,
        {**loha(), f"{AT.replace('q_', 'k_')}lora_A.weight": ones(2, 12)},
        r"k_proj.lora_A.weight is a factor of LoRA, .* LoHa",
    ),
    "field": ({**LOHA, "tomorrow": 3}, loha(), r"tomorrow = 3: unknown field"),
    "malformed": ({**LOHA, "alpha": "much"}, loha(), r"alpha must be a finite number"),
    "no P": ({**TINY, "save_projection": False}, tiny(tinylora_P=None), r"no tinylora_P.*=True"),
    "no v": (TINY, {k: t for k, t in tiny().items() if "_v." not in k}, r"not all of tinylora_v"),
    "v of others": (TINY, {**tiny(), "base_model.tinylora_v.2": ones(3)}, r"not all of .*v.2"),
    "P of no seed": (TINY, {**tiny(), "base_model.tinylora_v.1": ones(3)}, r"P is none of those"),
    "partly tied": (
        {**TINY, "weight_tying": 0.5},
        {**tiny(), "base_model.tinylora_v.1": ones(3)},
        r"weight_tying = 0.5 shares several",
    ),
    "sizes of P": (TINY, tiny(tinylora_P=ones(3, 2, 1)), r"tinylora_P has shape \(3, 2, 1\)"),
    "sizes of v": (TINY, tiny(tinylora_P=ones(2, 2, 2)), r"tinylora_v.0 has shape \(3,\)"),
    "beside LoRA": (
        LOHA,
        {**loha(), f"{AT}lora_A.weight": ones(2, 12)},
        r"lora_A.weight stands beside .*hada_w1_a",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_what_is_wrong_is_named_and_nothing_changes(case: str, cm: Any) -> None:
    config, tensors, message = CASES[case]
    before = cm.memory()
    with pytest.raises(CheckpointError, match=f"(?s){message}"):
        cm.load_adapter(lorafx.AdapterSource(tensors, config=config), "a")
    assert cm.adapters == ()
    assert cm.memory() == before


def test_integers_beyond_64_bits_are_numbers() -> None:
    config = {"peft_type": "DEFT", "alpha": 10**30, "target_modules": ["q_proj"]}
    tensors = {f"{AT}deft_P": ones(10, 2), f"{AT}deft_R": ones(2, 12)}
    (made,) = load_state(lorafx.AdapterSource(tensors, config=config), Small()).made.values()
    assert made.weight is not None
    assert float(made.weight.tensors[-1].max()) >= 5e29


@pytest.mark.parametrize("given", [LOHA, {k: v for k, v in LOHA.items() if k != "peft_type"}])
def test_what_is_right_is_loaded(given: Mapping[str, Any], cm: Any) -> None:
    cm.load_adapter(lorafx.AdapterSource(loha(), config=given), "a")
    x = ones(1, 12)
    want = cm(x) + 2 * 4 * 12  # α/r = 2, and each entry of ΔW is 2·2
    assert torch.allclose(cm(x, adapter_names=["a"]), want)
    cm.unload_adapter("a")


def test_weights_of_a_single_choice_are_empty(cm: Any) -> None:
    one = {
        f"{AT}vblora_logits_A_topk_indices": torch.zeros(1, 6, 1, dtype=torch.int64),
        f"{AT}vblora_logits_A_topk_weights": ones(1, 6, 0),
        "base_model.vblora_vector_bank": ones(4, 2),
    }
    cm.load_adapter(lorafx.AdapterSource({**TOPK, **one}, config={**VBLORA, "topk": 1}), "a")
    x = ones(1, 12)
    assert torch.allclose(cm(x, adapter_names=["a"]), cm(x) + 12)
    cm.unload_adapter("a")


def test_no_rank_was_left(cm: Any) -> None:
    """AdaLoRA prunes single modules to nothing."""
    tensors = {f"{AT}lora_A": ones(0, 12), f"{AT}lora_B": ones(10, 0), f"{AT}lora_E": ones(0, 1)}
    cm.load_adapter(lorafx.AdapterSource(tensors, config=ADALORA), "a")
    x = ones(1, 12)
    assert torch.equal(cm(x, adapter_names=["a"]), cm(x))
    cm.unload_adapter("a")


def test_a_whole_matrix_of_lokr_needs_room_for_a_weight(cm: Any) -> None:
    source = lorafx.AdapterSource(WHOLE, config=LOKR)
    with pytest.raises(lorafx.CapacityError, match=r"trainable_tokens=\{'q_proj': 3\}"):
        cm.load_adapter(source, "a")
    assert cm.adapters == ()
    model, x = lorafx.compile(Small().eval(), {"a": source}), ones(2, 12)
    got, base = model(x, adapter_names=["a", None]), model(x)
    torch.testing.assert_close(got, base + torch.tensor([[24.0], [0.0]]))  # α/r = 2


def test_small_files_make_no_large_factors(cm: Any) -> None:
    """A few megabytes whose factors would have 4·10⁹ numbers."""
    w = {"lokr_w1": ones(1000, 1000), "lokr_w2_a": ones(2000, 1), "lokr_w2_b": ones(1, 2000)}
    tensors = {f"{AT}{key}": tensor for key, tensor in w.items()}
    started = time.process_time()
    with pytest.raises(UnsupportedAdapterError, match="the model has room for 1040"):
        cm.load_adapter(lorafx.AdapterSource(tensors, config={**LOKR, "r": 1}), "a")
    assert time.process_time() - started < 5


def test_a_bank_makes_no_large_factors_either(cm: Any) -> None:
    tensors = TOPK | {"base_model.vblora_vector_bank": ones(4, 100_000)}
    with pytest.raises(UnsupportedAdapterError, match="the model has room for"):
        cm.load_adapter(lorafx.AdapterSource(tensors, config=VBLORA), "a")


DAMAGE: dict[str, Callable[[Tensor], Tensor]] = {
    "rows": lambda t: t[:-1],
    "columns": lambda t: t[..., :-1],
    "flat": torch.flatten,
    "deeper": lambda t: t[None],
    "complex": lambda t: t.to(torch.complex64),
    "integers": lambda t: t.to(torch.int64) + 99,
    "empty": lambda t: t.new_empty(0),
    "infinite": lambda t: torch.full_like(t, torch.inf, dtype=torch.float32),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_any_damage_is_an_error_of_lorafx(name: str, tmp_path: Path) -> None:
    base = random_base("llama")
    _, sites = build_sites(base, lorafx.LoraConfig(target_modules="all-linear"))
    folder = save(base, CONFIGS[name], tmp_path)
    tensors = load_file(folder / "adapter_model.safetensors")
    one = [key for key in tensors if "q_proj" in key or ".layers." not in key]
    for key in one:
        for damaged in (None, *(damage(tensors[key]) for damage in DAMAGE.values())):
            others = {k: t for k, t in tensors.items() if k != key}
            tried = others if damaged is None else {**others, key: damaged}
            source = lorafx.AdapterSource(tried, config=CONFIGS[name])
            with contextlib.suppress(LorafxError):
                read = read_adapter(source, "a", sites, model=base, max_rank=64, warn=False)
                numbers = [x for w in read.weights.values() for x in (w.A, w.B)]
                assert all(bool(x.isfinite().all()) for x in numbers), key


def test_without_a_model_only_sizes_are_read() -> None:
    state = load_state(lorafx.AdapterSource(loha(), config=LOHA))
    factor = state.tensors["q_proj.lora_A.weight"]
    assert factor.is_meta
    assert factor.shape == (4, 12)
