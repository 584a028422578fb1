"""Expert adapters that cannot be placed: what is wrong is named, all of it at once."""

from __future__ import annotations

from typing import Any

import pytest
from expert_files import PATH, Model, noise, pair, read, state_of
from torch import Tensor

import lorafx
from lorafx.adapter_store.peft_reader import read_adapter
from lorafx.errors import CapacityError, CheckpointError
from lorafx.prepare.marking import build_sites

pytestmark = pytest.mark.quick

BAD: dict[str, tuple[dict[str, Tensor], dict[str, Any], str]] = {
    "expert out of range": (
        pair((2, 5), (4, 2), f"{PATH}.7.gate_proj"),
        {},
        r"has 3 experts here \(0 … 2\), and the adapter has factors for 7",
    ),
    "another number of experts": (
        {**pair((16, 5), (8, 16), f"{PATH}.base_layer"), **pair((16, 4), (5, 16), PATH)},
        {},
        r"for the 3 experts of this model; 16 is not a multiple",
    ),
    "another number, divisible": (
        pair((12, 4), (5, 12), PATH),
        {},
        r"12 rows, which at the rank 2 of adapter_config.json are those of 6 experts",
    ),
    "another number, apart": (
        pair((4, 2, 4), (4, 5, 2), f"{PATH}.down_proj"),
        {},
        "do not fit 3 experts",
    ),
    "neither parameter": (pair((6, 7), (9, 6), PATH), {}, "fit neither gate_up_proj and down_proj"),
    "no B": ({f"{PATH}.0.w2.lora_A": noise(2, 4)}, {}, "has no factor B"),
    "no A": ({f"{PATH}.lora_B": noise(5, 6)}, {}, "has no factor A"),
    "NaN": (
        {f"{PATH}.0.w2.lora_A": noise(2, 4) / 0, f"{PATH}.0.w2.lora_B": noise(5, 2)},
        {},
        "NaN or infinite",
    ),
    "rank unlike the configuration": (
        pair((3, 4), (5, 3), f"{PATH}.0.w2"),
        {},
        "has rank 3, adapter_config.json says 2",
    ),
    "wrong size": (pair((2, 9), (5, 2), f"{PATH}.1.w2"), {}, r"needs \(r, 4\)"),
    "a left over key": (
        {**pair((2, 4), (5, 2), f"{PATH}.0.w2"), f"{PATH}.0.w2.lora_C": noise(2)},
        {},
        "is not a LoRA factor, and nothing in the model has this name",
    ),
    "an unknown projection": (
        {**pair((2, 4), (5, 2), f"{PATH}.0.w2"), **pair((2, 4), (5, 2), f"{PATH}.0.w7")},
        {},
        r"block.experts.0.w7: no such module",
    ),
    "the whole and its half": (
        {**pair((2, 5), (8, 2), f"{PATH}.0.w13"), **pair((2, 5), (4, 2), f"{PATH}.0.w1")},
        {},
        "both have factors for the same columns",
    ),
    "all experts and one": (
        {**pair((3, 2, 4), (3, 5, 2), f"{PATH}.w2"), **pair((2, 4), (5, 2), f"{PATH}.1.w2")},
        {},
        "both have factors for the same columns",
    ),
    "one A twice": (
        {**pair((2, 4), (5, 2), f"{PATH}.1.w2"), f"{PATH}.w2.lora_A": noise(2, 4)},
        {},
        "is for all experts, but .* for one of them",
    ),
    "one pair or stacked": (
        pair((6, 4), (5, 6), f"{PATH}.down_proj"),
        {"r": 5},
        "rank 6 for all experts or",
    ),
}


@pytest.mark.parametrize("case", list(BAD))
def test_bad_input(case: str) -> None:
    tensors, config, message = BAD[case]
    with pytest.raises(CheckpointError, match=message):
        read(Model(), tensors, **config)


def test_targeted_parameters_without_factors() -> None:
    tensors = pair((6, 4), (5, 6), PATH)
    targets = ["experts.gate_up_proj", "experts.down_proj", "router.weight"]
    message = r"2 of them \(67 %\): block.router, block.experts.gate_up_proj"
    with pytest.warns(lorafx.LorafxWarning, match=message):
        adapter = read(Model(), tensors, target_parameters=targets)
    assert list(adapter.weights) == [f"{PATH}.down_proj"]


def test_all_problems_at_once() -> None:
    tensors = {
        key: t for case in ("expert out of range", "no B") for key, t in BAD[case][0].items()
    }
    tensors.update(pair((2, 9), (5, 2), f"{PATH}.1.w2"))
    with pytest.raises(CheckpointError) as caught:
        read(Model(), tensors)
    assert str(caught.value).count("\n  - ") == 3


def test_a_rank_over_what_the_banks_hold() -> None:
    tensors = {
        **pair((2, 5), (4, 2), f"{PATH}.0.gate_proj"),
        **pair((2, 5), (4, 2), f"{PATH}.0.up_proj", seed=2),
    }
    interleaved = Model(halves="interleaved")
    assert read(interleaved, tensors, max_rank=2).rank == 2
    with pytest.raises(CapacityError, match="rank 2 is over max_rank = 1"):
        read(interleaved, tensors, max_rank=1)


def test_w13_of_interleaved_columns_is_refused() -> None:
    with pytest.raises(CheckpointError, match="w13 may mean interleaved or consecutive halves"):
        read(Model(halves="interleaved"), pair((2, 5), (8, 2), f"{PATH}.0.w13"))


def test_a_projection_that_the_experts_do_not_have() -> None:
    with pytest.raises(CheckpointError, match="the experts here have no gate_proj"):
        read(Model(halves=""), pair((2, 5), (4, 2), f"{PATH}.0.gate_proj"))


def test_experts_that_were_not_selected() -> None:
    model = Model()
    _, sites = build_sites(model, lorafx.LoraConfig(target_modules=["down_proj"]))
    for tensors in (pair((2, 5), (4, 2), f"{PATH}.0.w1"), pair((6, 5), (8, 6), PATH)):
        with pytest.raises(CheckpointError, match=r"gate_up_proj exists but was not selected"):
            read_adapter(state_of(tensors), "a", sites, model=model)
