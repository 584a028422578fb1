"""Weights that are functions of the base's, in one batch with LoRA and the base."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from dense_merge import TOLERANCE, check_mixed, error, random_base
from method_files import MethodCase

import lorafx

pytestmark = pytest.mark.any_sizes

CONFIGS = {
    "lora": peft.LoraConfig(r=3, lora_alpha=4, target_modules=["q_proj", "down_proj"]),
    "oft": peft.OFTConfig(oft_block_size=4, target_modules=["q_proj", "down_proj"]),
    "hra": peft.HRAConfig(r=4, target_modules=["q_proj"]),
    "ia3": peft.IA3Config(
        target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]
    ),
    "hira": peft.HiraConfig(r=2, target_modules=["q_proj", "v_proj"]),
    "road": peft.RoadConfig(group_size=4, target_modules=["v_proj"]),
}


IDS = torch.arange(24).reshape(4, 6)


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> MethodCase:
    return MethodCase.of_configs("llama", CONFIGS, tmp_path_factory.mktemp("changed"))


@pytest.fixture(scope="module")
def cm(case: MethodCase) -> Any:
    return case.compile(dynamic=True)


def check(cm: Any, case: MethodCase, *names: str | None) -> None:
    check_mixed(cm, case, names, {"input_ids": IDS[: len(names)]})


def test_in_mixed_batches_of_one_graph(case: MethodCase, cm: Any) -> None:
    check(cm, case, "oft", None, "lora", "hra")
    captured = cm.recompiles
    check(cm, case, None, "ia3", "lora", "hira")
    check(cm, case, "road", "oft", "ia3", "lora")
    assert cm.recompiles == captured


@pytest.mark.parametrize("start", ["eager", pytest.param("compiled", marks=pytest.mark.slow)])
def test_generated_tokens_are_those_of_the_merged_models(
    start: str, case: MethodCase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORAFX_START", start)
    cm: Any = case.compile()
    ids = torch.tensor([[3, 5, 7], [3, 5, 7], [2, 4, 6]])
    names = ["oft", None, "hra"]
    got = cm.generate(ids, adapter_names=names, max_new_tokens=6, do_sample=False)
    for row, name in enumerate(names):
        alone: Any = case.alone(name)
        want = alone.generate(ids[row : row + 1], max_new_tokens=6, do_sample=False)
        assert torch.equal(got[row, : want.shape[1]], want[0])  # which may end before the others


def test_merged_and_taken_back(case: MethodCase, cm: Any) -> None:
    before = cm(IDS).logits
    cm.merge("oft")
    assert error(cm(IDS).logits, case.expected(["oft"] * 4, {"input_ids": IDS})) <= TOLERANCE
    cm.unmerge()
    assert torch.equal(cm(IDS).logits, before)
    check(cm, case, "hira", "oft")


def test_a_slot_that_was_written_while_another_was_merged(case: MethodCase, cm: Any) -> None:
    cm.merge("lora")
    for name in ("oft", "hira"):
        cm.pin_adapter(name)
    cm.unmerge()
    check(cm, case, "hira", None, "oft")
    cm.merge("lora")
    with pytest.raises(lorafx.ConfigError, match=r"made of the base's own.*'lora' is merged"):
        cm.load_adapter(case.folders["hra"], "another")
    cm.load_adapter(case.folders["oft"], "late")  # which has a structure
    cm.unmerge()
    got = cm(IDS, adapter_names=["late", "ia3", None, "late"]).logits
    want = case.expected(["oft", "ia3", None, "oft"], {"input_ids": IDS})
    assert error(got, want) <= TOLERANCE
    for name in ("oft", "hira"):
        cm.unpin_adapter(name)


def test_a_function_that_does_not_fit_the_weight(cm: Any) -> None:
    config = {"peft_type": "OFT", "peft_version": "0.21.2", "block_share": True}
    config |= {"use_cayley_neumann": False, "target_modules": ["q_proj"]}
    key = "base_model.model.model.layers.0.self_attn.q_proj.oft_R.weight"
    source = lorafx.AdapterSource({key: torch.ones(1, 10)}, config=config)  # blocks of 5
    with pytest.raises(
        lorafx.CheckpointError, match=r"\(24, 24\), and blocks of 5 do not divide its inputs"
    ):
        cm.load_adapter(source, "another")
    assert "another" not in cm.adapters


def test_loaded_without_room(case: MethodCase) -> None:
    cm = lorafx.compile(case.model(), lorafx.LoraConfig(target_modules=["q_proj", "down_proj"]))
    one_setting = r"trainable_tokens=\{'\S*down_proj': 4, '\S*q_proj': 4\}"
    with pytest.raises(lorafx.CapacityError, match=one_setting):
        cm.load_adapter(case.folders["oft"], "oft")
    with pytest.raises(lorafx.CapacityError, match=r"modules_to_save=.*q_proj"):
        cm.load_adapter(case.folders["hra"], "hra")
    assert cm.adapters == ()


def test_new_base_weights(case: MethodCase) -> None:
    cm, other = case.compile(dynamic=False), random_base("llama")
    cm(IDS, adapter_names=["oft", None, "hira", None])
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    cm.load_weights(other.state_dict())
    check(cm, MethodCase(other, case.folders), "oft", None, "hira")
