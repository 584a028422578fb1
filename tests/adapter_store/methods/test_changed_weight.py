"""Weights that are functions of the base's, in one batch with LoRA and the base."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from dense_merge import REFERENCE, TOLERANCE, error, random_base
from method_files import merged, save
from torch import nn

import lorafx

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


class Served:
    """A compiled model with adapters of these methods."""

    def __init__(self, root: Path) -> None:
        self.base = random_base("llama", num_hidden_layers=1)
        self.folders = {n: save(self.base, c, root / n) for n, c in CONFIGS.items()}
        self.exact: dict[str | None, nn.Module] = {None: copy.deepcopy(self.base).double()}
        self.model = copy.deepcopy(self.base)
        self.cm: Any = lorafx.compile(
            self.model, None, adapters=self.folders, dynamic=True, options=REFERENCE
        )

    def alone(self, name: str | None) -> Any:
        if name not in self.exact:
            self.exact[name] = merged(self.base, self.folders[name])
        return self.exact[name]

    def check(self, names: list[str | None]) -> None:
        ids = torch.randint(0, 60, (len(names), 6), generator=torch.Generator().manual_seed(1))
        got = self.cm(ids, adapter_names=names).logits
        with torch.no_grad():
            base = self.alone(None)(ids).logits
            for row, name in enumerate(names):
                want = self.alone(name)(ids[row : row + 1]).logits[0]
                assert error(got[row].double(), want) <= TOLERANCE, name
                assert name is None or error(want, base[row]) > 1000 * TOLERANCE, name


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Served:
    return Served(tmp_path_factory.mktemp("changed"))


def test_in_mixed_batches_of_one_graph(served: Served) -> None:
    served.check(["oft", None, "lora", "hra"])
    captured = served.cm.recompiles
    served.check([None, "ia3", "lora", "hira"])
    served.check(["road", "oft", "ia3", "lora"])
    assert served.cm.recompiles == captured


@pytest.mark.usefixtures("in_eager_mode")
def test_generated_tokens_are_those_of_the_merged_models(served: Served) -> None:
    cm: Any = lorafx.compile(copy.deepcopy(served.base), served.folders, options=REFERENCE)
    ids = torch.tensor([[3, 5, 7], [3, 5, 7], [2, 4, 6]])
    names = ["oft", None, "road"]
    got = cm.generate(ids, adapter_names=names, max_new_tokens=6, do_sample=False)
    for row, name in enumerate(names):
        alone = served.alone(name)
        want = alone.generate(ids[row : row + 1], max_new_tokens=6, do_sample=False)
        assert torch.equal(got[row, : want.shape[1]], want[0])


def test_merged_and_taken_back(served: Served) -> None:
    ids = torch.arange(8).reshape(2, 4)
    before = served.cm(ids).logits
    served.cm.merge("oft")
    got = served.cm(ids).logits
    served.cm.unmerge()
    with torch.no_grad():
        assert error(got.double(), served.alone("oft")(ids).logits) <= TOLERANCE
    assert torch.equal(served.cm(ids).logits, before)
    served.check(["hira", "oft"])


def test_a_slot_that_was_written_while_another_was_merged(served: Served) -> None:
    served.cm.merge("lora")
    for name in ("oft", "hira"):
        served.cm.pin_adapter(name)
    served.cm.unmerge()
    served.check(["hira", None, "oft"])
    served.cm.merge("lora")
    with pytest.raises(lorafx.ConfigError, match=r"made of the base's own.*'lora' is merged"):
        served.cm.load_adapter(served.folders["hra"], "another")
    served.cm.unmerge()
    for name in ("oft", "hira"):
        served.cm.unpin_adapter(name)


def test_a_function_that_does_not_fit_the_weight(served: Served) -> None:
    config = {"peft_type": "OFT", "peft_version": "0.21.2", "block_share": True}
    config |= {"use_cayley_neumann": False, "target_modules": ["q_proj"]}
    key = "base_model.model.model.layers.0.self_attn.q_proj.oft_R.weight"
    source = lorafx.AdapterSource({key: torch.ones(1, 10)}, config=config)  # blocks of 5
    with pytest.raises(
        lorafx.CheckpointError, match=r"\(24, 24\), and blocks of 5 do not divide its inputs"
    ):
        served.cm.load_adapter(source, "another")
    assert "another" not in served.cm.adapters


def test_a_sum_is_refused(served: Served) -> None:
    with pytest.raises(lorafx.ConfigError, match="'oft' has weights of its own"):
        served.cm(torch.ones(1, 3, dtype=torch.long), adapter_names=[{"oft": 0.5, "lora": 1.0}])


def test_loaded_without_room(served: Served) -> None:
    cm: Any = lorafx.compile(
        copy.deepcopy(served.base), lorafx.LoraConfig(target_modules=["q_proj", "down_proj"])
    )
    one_setting = r"trainable_tokens=\{'\S*down_proj': 4, '\S*q_proj': 4\}"
    with pytest.raises(lorafx.CapacityError, match=one_setting):
        cm.load_adapter(served.folders["oft"], "oft")
    with pytest.raises(lorafx.CapacityError, match=r"modules_to_save=.*q_proj"):
        cm.load_adapter(served.folders["hra"], "hra")
    assert cm.adapters == ()


def test_new_base_weights(served: Served, tmp_path: Path) -> None:
    base = copy.deepcopy(served.base)
    cm: Any = lorafx.compile(
        base, None, adapters={n: served.folders[n] for n in ("oft", "hira")}, options=REFERENCE
    )
    ids = torch.arange(12).reshape(3, 4)
    cm(ids, adapter_names=["oft", None, "hira"])
    other = random_base("llama", num_hidden_layers=1)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    cm.load_weights(other.state_dict())
    got = cm(ids, adapter_names=["oft", None, "hira"]).logits
    with torch.no_grad():
        for row, name in ((0, "oft"), (2, "hira")):
            want = merged(other, served.folders[name])(ids[row : row + 1]).logits[0]
            assert error(got[row].double(), want) <= TOLERANCE
