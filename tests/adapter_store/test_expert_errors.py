"""Expert adapters that cannot be placed: what is wrong is named."""

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
    "another number, divisible": (
        pair((12, 4), (5, 12), PATH),
        {},
        r"12 rows, which at the rank 2 of adapter_config.json are those of 6 experts",
    ),
    "neither parameter": (pair((6, 7), (9, 6), PATH), {}, "fit neither gate_up_proj and down_proj"),
    "no B": ({f"{PATH}.0.w2.lora_A": noise(2, 4)}, {}, "has no factor B"),
    "NaN": (
        {f"{PATH}.0.w2.lora_A": noise(2, 4) / 0, f"{PATH}.0.w2.lora_B": noise(5, 2)},
        {},
        "NaN or infinite",
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


def test_a_rank_over_what_the_banks_hold() -> None:
    tensors = {
        **pair((2, 5), (4, 2), f"{PATH}.0.gate_proj"),
        **pair((2, 5), (4, 2), f"{PATH}.0.up_proj", seed=2),
    }
    interleaved = Model(halves="interleaved")
    assert read(interleaved, tensors, max_rank=2).rank == 2
    with pytest.raises(CapacityError, match="rank 2 is over max_rank = 1"):
        read(interleaved, tensors, max_rank=1)


def test_experts_that_were_not_selected() -> None:
    model = Model()
    _, sites = build_sites(model, lorafx.LoraConfig(target_modules=["down_proj"]))
    for tensors in (pair((2, 5), (4, 2), f"{PATH}.0.w1"), pair((6, 5), (8, 6), PATH)):
        with pytest.raises(CheckpointError, match=r"gate_up_proj exists but was not selected"):
            read_adapter(state_of(tensors), "a", sites, model=model)
