"""Adapters with weights of their own where the banks have room for those of one at a time."""

from __future__ import annotations

import pytest
import torch
from dense_merge import REFERENCE, Case, check_mixed, random_base, save_adapter
from own_weights import own_case
from step_logits import StepLogits, answers, check_logits
from tiny_models import token_inputs
from transformers.generation.configuration_utils import ContinuousBatchingConfig

import lorafx
from lorafx.errors import CapacityError

QV = ["q_proj", "v_proj"]


@pytest.fixture(scope="module")
def case(tmp_path_factory) -> Case:
    folder = tmp_path_factory.mktemp("own")
    base = random_base("llama", num_hidden_layers=1)
    plan = {"target_modules": QV, "modules_to_save": ["lm_head"]}
    found = own_case(base, folder, {"first": plan, "second": plan})
    found.folders["plain"] = save_adapter(base, folder / "plain", rank=2, targets=QV)
    return found


def compiled(case: Case, **options: str) -> lorafx.CompiledModel:
    config = lorafx.LoraConfig(
        [*QV, "lm_head"], modules_to_save=["lm_head"], max_adapters=3, max_own_weights=1
    )
    return lorafx.compile(
        case.model(), config, adapters=case.folders, options={**REFERENCE, **options}
    )


def test_a_sum_that_is_one_adapter_counts_before_it_is_made(case) -> None:
    cm = compiled(case, overflow="waves")
    torch.manual_seed(0)
    inputs = token_inputs(4, 5)
    alone = {"first": 1.0, "plain": 0.0}
    got = cm(**inputs, adapter_names=[alone, "second", alone, "second"]).logits
    want = cm(**inputs, adapter_names=["first", "second", "first", "second"]).logits
    assert torch.equal(got, want)
    check_mixed(cm, case, ["first", "second", "plain", None], inputs)
    cm = compiled(case)
    with pytest.raises(CapacityError, match="own weights"):
        cm(**inputs, adapter_names=[alone, "second", None, None])


@pytest.mark.usefixtures("earlier_objects_frozen")
def test_requests_of_an_engine_take_turns(case) -> None:
    cm = compiled(case)
    config = ContinuousBatchingConfig(page_size=4, num_blocks=64, max_batch_tokens=24)
    work = [([3 + i, 4, 5], name) for i, name in enumerate(["first", "second", None, "plain"] * 2)]
    with cm.continuous_batching(None, config, warmup=False) as engine:
        seen = StepLogits(engine)
        ids = [engine.add_request(p, adapter=a, max_new_tokens=3) for p, a in work]
        outputs = answers(engine, ids)
    check_logits(case, seen, outputs, dict(zip(ids, (a for _, a in work), strict=True)))
