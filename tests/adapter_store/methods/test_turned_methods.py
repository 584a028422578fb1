"""Methods that turn or scale a weight, against what PEFT merges in float64."""

from __future__ import annotations

import copy
import pickle
import re
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from method_files import merged, save
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lorafx.adapter_store.methods.factored import as_factors
from lorafx.adapter_store.saved import AdapterSource, read_source
from lorafx.errors import LorafxError

TO = {"target_modules": ["q_proj", "down_proj"]}
CONFIGS = {
    "oft": peft.OFTConfig(oft_block_size=4, **TO),
    "oft cayley": peft.OFTConfig(oft_block_size=4, use_cayley_neumann=False, **TO),
    "oft two terms": peft.OFTConfig(r=2, oft_block_size=0, num_cayley_neumann_terms=2, **TO),
    "oft three terms": peft.OFTConfig(oft_block_size=4, num_cayley_neumann_terms=3, **TO),
    "oft shared": peft.OFTConfig(oft_block_size=4, block_share=True, **TO),
    "coft": peft.OFTConfig(oft_block_size=4, coft=True, eps=0.1, **TO),
    "ia3": peft.IA3Config(feedforward_modules=["down_proj"], **TO),
    "ia3 pattern": peft.IA3Config(feedforward_modules=r".*down_proj", **TO),
    "hra": peft.HRAConfig(r=3, **TO),
    "hra basis": peft.HRAConfig(r=3, apply_GS=True, **TO),
    "road 1": peft.RoadConfig(variant="road_1", group_size=4, **TO),
    "road 2": peft.RoadConfig(variant="road_2", group_size=4, **TO),
    "road 4": peft.RoadConfig(variant="road_4", group_size=2, **TO),
    "vera": peft.VeraConfig(r=4, **TO),
}
CLOSE = {"rtol": 1e-5, "atol": 1e-6}


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q_proj = nn.Linear(16, 8)
        self.down_proj = nn.Linear(8, 12, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.q_proj(x))


def changed(base: nn.Module, folder: Path) -> nn.Module:
    """`base` in float64 with each weight that the reader gives."""
    saved = as_factors(read_source(AdapterSource(folder)), base)
    twin: Any = copy.deepcopy(base).double()
    for place in ("q_proj", "down_proj"):
        module = twin.get_submodule(place)
        (key,) = (k for k in saved.made if re.search(rf"{place}\.lora_[AW]", k))
        own = saved.made[key].weight
        if own is None:
            a, b = saved.tensors[key], saved.tensors[key.replace("lora_A", "lora_B")]
            delta = b.double() @ a.double()[:, : module.in_features]
            module.weight.data += delta
            continue
        own = pickle.loads(pickle.dumps(own))
        assert own.out_features in (None, module.out_features)
        assert own.in_features in (None, module.in_features)
        if module.bias is not None:
            module.bias.data = own.own_bias(module.bias.data, module.weight.data)
        module.weight.data = own.weight(module.weight.data)
    return twin


@pytest.mark.parametrize("name", CONFIGS)
def test_the_weight_is_what_peft_merges(name: str, tmp_path: Path) -> None:
    base = Small().eval()
    folder = save(base, CONFIGS[name], tmp_path / "adapter")
    got, want = changed(base, folder), merged(base, folder)
    assert not torch.allclose(got.q_proj.weight, base.q_proj.weight.double())
    for key, tensor in want.state_dict().items():
        torch.testing.assert_close(got.state_dict()[key], tensor, **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("name", CONFIGS)
def test_the_model_gives_what_peft_gives_unmerged(name: str, tmp_path: Path) -> None:
    base = Small().eval()
    folder = save(base, CONFIGS[name], tmp_path / "adapter")
    twin: Any = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(folder)).eval()
    x = torch.randn(3, 16)
    torch.testing.assert_close(
        changed(base, folder)(x.double()).float(), twin(x), rtol=1e-4, atol=1e-5
    )


HOSTILE = {
    "shape": ("oft", "q_proj.oft_R.weight", torch.ones(4, 5), r"oft_R.weight has shape \(4, 5\)"),
    "nan": ("hra", "q_proj.hra_u", torch.full((16, 3), torch.nan), r"hra_u holds 48 NaN"),
    "zeros": ("hra", "q_proj.hra_u", torch.zeros(16, 3), r"q_proj.hra_u has a column of zeros"),
    "other side": ("ia3", "q_proj.ia3_l", torch.ones(1, 8), r"q_proj.ia3_l has shape \(1, 8\)"),
    "half": ("road 1", "q_proj.road_alpha", None, r"q_proj has no road_alpha"),
    "groups": ("road 1", "q_proj.road_theta", torch.ones(3), r"road_(theta|alpha) has shape"),
    "projection": ("vera", "vera_A", None, r"no vera_A.*save_projection=True"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_file_that_cannot_be_meant_is_refused(case: str, tmp_path: Path) -> None:
    name, end, tensor, message = HOSTILE[case]
    base = Small().eval()
    folder = save(base, CONFIGS[name], tmp_path / "adapter")
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    (key,) = (key for key in tensors if key.endswith(end))
    tensors.pop(key)
    if tensor is not None:
        tensors[key] = tensor
    save_file(tensors, file)
    with pytest.raises(LorafxError, match=message):
        changed(base, folder)
