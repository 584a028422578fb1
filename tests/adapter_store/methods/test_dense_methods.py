"""Methods that change all or single numbers of a weight, against what PEFT merges in float64."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from method_files import damage, merged, save
from torch import Tensor, nn

import lorafx
from lorafx.adapter_store.checkpoint import load_state
from lorafx.adapter_store.methods.method import Misfit
from lorafx.adapter_store.saved import AdapterSource
from lorafx.errors import LorafxError

TO = {"target_modules": ["q_proj", "odd"]}
EVEN = {"target_modules": ["q_proj", "down_proj"]}
CONFIGS = {
    "hira": peft.HiraConfig(r=3, rank_pattern={"odd": 2}, **TO),
    "c3a": peft.C3AConfig(block_size=4, block_size_pattern={"q_proj": 8}, **EVEN),
    "bat": peft.MissConfig(r=4, init_weights="bat", **EVEN),
    "randlora": peft.RandLoraConfig(r=3, randlora_alpha=7, **TO),
    "randlora sparse": peft.RandLoraConfig(r=4, sparse=True, **EVEN),
    "glora": peft.GloraConfig(r=3, **TO),
    "glora vectors": peft.GloraConfig(
        config_A_B="vector", config_C="vector", config_D_E="vector", **TO
    ),
    "glora constants": peft.GloraConfig(config_A_B="constant", config_C="none", **EVEN),
    "glora of biases": peft.GloraConfig(config_A_B="none", config_C="vector", **TO),
    "lokr whole": peft.LoKrConfig(r=8, alpha=3, **EVEN),
    "loha": peft.LoHaConfig(r=4, alpha=3, **EVEN),
    "fourierft": peft.FourierFTConfig(n_frequency=20, n_frequency_pattern={"odd": 9}, **TO),
    "fourierft seed": peft.FourierFTConfig(n_frequency=50, random_loc_seed=3, scaling=40, **TO),
    "waveft": peft.WaveFTConfig(n_frequency=30, **TO),
    "waveft proportional": peft.WaveFTConfig(n_frequency=30, proportional_parameters=True, **TO),
    "waveft plain": peft.WaveFTConfig(n_frequency=30, use_idwt=False, wavelet_family="sym3", **TO),
    "shira": peft.ShiraConfig(r=2, **TO),
    "supertuning": peft.SupertuningConfig(sparsity=0.9, **TO),
    "supra": peft.SupertuningConfig(sparsity=0.8, select_top=False, r=2, lora_alpha=3, **TO),
}
CLOSE = {"rtol": 1e-5, "atol": 1e-6}


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q_proj = nn.Linear(16, 8)
        self.down_proj = nn.Linear(8, 12, bias=False)
        self.odd = nn.Linear(12, 7)

    def forward(self, x: Tensor) -> Tensor:
        return self.odd(self.down_proj(self.q_proj(x)))


def changed(base: nn.Module, source: AdapterSource) -> nn.Module:
    """`base` in float64 with each weight that the reader gives."""
    made = load_state(source, base).made
    twin: Any = copy.deepcopy(base).double()
    for key, of in made.items():
        path = key.removeprefix("base_model.model.").removesuffix(".lora_W.weight")
        own, module = pickle.loads(pickle.dumps(of.weight)), twin.get_submodule(path)
        assert own.out_features in (None, module.out_features)
        assert own.in_features in (None, module.in_features)
        before = [parameter.data.clone() for parameter in module.parameters()]
        if module.bias is not None:
            module.bias.data = own.own_bias(module.bias.data, module.weight.data)
        module.weight.data = own.weight(module.weight.data)
        assert not all(map(torch.equal, before, module.parameters()))
    return twin


@torch.no_grad()
@pytest.mark.parametrize("name", CONFIGS)
def test_weights_are_those_that_peft_merges(name: str, tmp_path: Path) -> None:
    base = Small().eval()
    folder = save(base, CONFIGS[name], tmp_path / "adapter")
    got, want = changed(base, AdapterSource(folder)), merged(base, folder)
    for key, tensor in want.state_dict().items():
        torch.testing.assert_close(got.state_dict()[key], tensor, **CLOSE)
    twin: Any = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(folder)).eval()
    x = torch.randn(3, 16)
    torch.testing.assert_close(got(x.double()).float(), twin(x), rtol=1e-4, atol=1e-5)


def rand(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


@pytest.mark.parametrize("prefix", ["lora_unet_", "lycoris_", "diffusion_model."])
@pytest.mark.parametrize("norms", [None, (8, 1), (1, 16)])
def test_lokr_of_lycoris_with_whole_matrices(prefix: str, norms: tuple[int, int] | None) -> None:
    base, at = Small().double(), f"{prefix}q_proj"
    w1, w2a, w2b = rand(2, 4), rand(4, 3), rand(3, 4)
    tensors = {f"{at}.lokr_w1": w1, f"{at}.lokr_w2_a": w2a, f"{at}.lokr_w2_b": w2b}
    tensors[f"{at}.alpha"] = torch.tensor(6.0)
    want = base.q_proj.weight + 2 * torch.kron(w1, w2a @ w2b)
    if norms is not None:
        m = tensors[f"{at}.dora_scale"] = rand(*norms).abs()
        want = m * want / want.norm(dim=norms.index(1), keepdim=True)
    got = changed(base, AdapterSource(tensors))
    torch.testing.assert_close(got.q_proj.weight, want)


def test_norms_of_inputs_need_no_factors() -> None:
    """Which DoRA here cannot have."""
    base, m = Small().double(), rand(1, 16)
    b1, a1, b2, a2 = rand(8, 1), rand(1, 16), rand(8, 1), rand(1, 16)
    names = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
    tensors = dict(zip(names, (b1, a1, b2, a2), strict=True)) | {"alpha": torch.tensor(1.0)}
    tensors["dora_scale"] = m
    got = changed(base, AdapterSource({f"lycoris_q_proj.{k}": t for k, t in tensors.items()}))
    want = base.q_proj.weight + (b1 @ a1) * (b2 @ a2)
    torch.testing.assert_close(got.q_proj.weight, m * want / want.norm(dim=0))


@pytest.mark.parametrize("prefix", ["lora_unet_", "lycoris_", "diffusion_model."])
def test_whole_differences(prefix: str) -> None:
    base, at = (
        Small().double(),
        {name: f"{prefix}{name}." for name in ("q_proj", "down_proj", "odd")},
    )
    tensors = {f"{at['q_proj']}diff": rand(8, 16), f"{at['q_proj']}diff_b": rand(8)}
    tensors |= {f"{at['down_proj']}diff": rand(12, 8), f"{at['odd']}diff_b": rand(7)}
    got, want = changed(base, AdapterSource(tensors)), base.state_dict()
    for key, tensor in tensors.items():
        name = key.removeprefix(prefix).replace("diff_b", "bias").replace("diff", "weight")
        want[name] = want[name] + tensor
    for name, tensor in want.items():
        torch.testing.assert_close(got.state_dict()[name], tensor)


@torch.no_grad()
@pytest.mark.parametrize("names", [("lora_down", "lora_up"), ("lora_A", "lora_B")])
def test_differences_of_biases_beside_factors(names: tuple[str, str]) -> None:
    """Of one module: the other's bias is the base's."""
    base = Small().eval()
    a, b, more_a, more_b, diff_b = (
        rand(*s).float() for s in ((2, 16), (8, 2), (2, 12), (7, 2), (8,))
    )
    pairs = {"q_proj": (a, b), "odd": (more_a, more_b)}
    tensors = {"lora_unet_q_proj.diff_b": diff_b}
    for place, pair in pairs.items():
        tensors |= {f"lora_unet_{place}.{n}.weight": t for n, t in zip(names, pair, strict=True)}
        tensors[f"lora_unet_{place}.alpha"] = torch.tensor(6.0)
    want = copy.deepcopy(base)
    want.q_proj.weight += 3 * b @ a
    want.odd.weight += 3 * more_b @ more_a
    want.q_proj.bias += diff_b
    cm, x = lorafx.compile(base, {"a": AdapterSource(tensors)}), torch.randn(2, 16)
    got = cm(x, adapter_names=["a", None])
    torch.testing.assert_close(got, torch.stack((want(x)[0], base(x)[1])), rtol=1e-4, atol=1e-4)


OF_LYCORIS = {
    "norm": ("q_proj.diff", torch.ones(8), r"q_proj.diff has shape \(8,\): .*norms"),
    "beside factors": (
        "q_proj.lora_up.weight",
        torch.ones(8, 2),
        r"q_proj has lora_up, which mean",
    ),
    "bias": ("q_proj.diff_b", torch.ones(7), r"q_proj.diff_b has shape \(7,\), it needs \(8\)"),
    "nan": ("q_proj.diff", torch.full((8, 16), torch.nan), r"q_proj.diff holds 128 NaN"),
}


@pytest.mark.parametrize("case", OF_LYCORIS)
def test_differences_that_cannot_be_meant_are_refused(case: str) -> None:
    key, tensor, message = OF_LYCORIS[case]
    tensors = {"lora_unet_q_proj.diff": torch.ones(8, 16), f"lora_unet_{key}": tensor}
    with pytest.raises(LorafxError, match=message):
        changed(Small(), AdapterSource(tensors))


NAN = torch.full((3, 16), torch.nan)
#: name, end of a key, what it is instead (None: absent), the message.
HOSTILE: Mapping[str, tuple[str, str, Tensor | None, str]] = {
    "shape": ("hira", "q_proj.hira_A", torch.ones(7, 5), r"hira_[AB] has shape"),
    "nan": ("hira", "q_proj.hira_A", NAN, r"q_proj.hira_A holds 48 NaN"),
    "blocks": ("bat", "q_proj.miss_block", torch.ones(2, 4, 3), r"miss_block has shape"),
    "rank of blocks": ("bat", "q_proj.miss_block", torch.ones(4, 2, 2), r"rank 2, .* says 4"),
    "basis": ("randlora", "base_model.randlora_A", torch.ones(3, 2, 12), r"randlora_A has shape"),
    "inputs": ("randlora", "odd.randlora_gamma", torch.ones(3, 6), r"gamma.* 6 .*\(7, 12\)"),
    "few bases": (
        "randlora",
        "odd.randlora_gamma",
        torch.ones(9, 7),
        r"gamma.* needs \(3, smaller",
    ),
    "no lambda": ("randlora", "odd.randlora_lambda", None, r"odd has no randlora_lambda"),
    "half of A": ("glora", "odd.glora_A.Xu", None, r"odd has no glora_A.Xu"),
    "width of A": ("glora", "odd.glora_A.Xu", torch.ones(3, 9), r"glora_B.Xu has shape \(3, 12\)"),
    "vector": ("glora", "odd.glora_D.X", torch.ones(5), r"glora_D.X has shape \(5,\)"),
    "zeros": ("glora constants", "q_proj.glora_C.zeros", torch.ones(16, 1), r"C.zeros .*not 0"),
    "too many": ("fourierft", "q_proj.fourierft_spectrum", torch.ones(129), r"129 .*\(8, 16\)"),
    "matrix": ("waveft", "odd.waveft_spectrum", torch.ones(3, 3), r"odd.waveft_spectrum has shape"),
    "row": ("shira", "odd.shira_indices", torch.full((2, 38), 7), r"indices points outside"),
    "halves": ("shira", "odd.shira_indices", torch.ones(3, 38).int(), r"needs \(2, 38\)"),
    "floats": ("shira", "odd.shira_indices", torch.ones(2, 38), r"indices is torch.float32"),
    "no values": ("shira", "odd.shira_weight", None, r"odd has no shira_weight"),
    "negative": ("supra", "odd.supertuning_indices", -torch.ones(16).int(), r"points outside"),
    "count": ("supra", "odd.supertuning_indices", torch.ones(9).int(), r"has shape \(9,\)"),
    "unsaved": ("supra", "odd.supertuning_indices", None, r"save_precomputed_indices=True"),
    "half": ("supra", "odd.supertuning_lora_B", None, r"odd has no supertuning_lora_B"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_file_that_cannot_be_meant_is_refused(case: str, tmp_path: Path) -> None:
    name, end, tensor, message = HOSTILE[case]
    base = Small().eval()
    folder = save(base, CONFIGS[name], tmp_path / "adapter")
    damage(folder, end, tensor)
    with pytest.raises((LorafxError, Misfit), match=message):
        changed(base, AdapterSource(folder))


@torch.no_grad()
def test_they_are_served_in_one_batch(tmp_path: Path) -> None:
    base, x = Small().eval(), torch.randn(5, 16)
    biased = peft.FourierFTConfig(n_frequency=20, bias="fourier_only", **TO)
    configs = {name: CONFIGS[name] for name in ("glora", "supra", "bat")} | {"biased": biased}
    folders = {name: save(base, config, tmp_path / name) for name, config in configs.items()}
    cm = lorafx.compile(base, folders)
    got = cm(x, adapter_names=[*folders, None]).double()
    want = [
        merged(base, folder)(row.double()) for folder, row in zip(folders.values(), x, strict=False)
    ]
    torch.testing.assert_close(got[:4], torch.stack(want), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(got[4], base(x).double()[4], rtol=1e-4, atol=1e-4)


def test_a_bias_that_was_trained_besides_is_refused(tmp_path: Path) -> None:
    config = peft.GloraConfig(r=2, bias="glora_only", **TO)
    folder = save(Small(), config, tmp_path / "adapter")
    with pytest.raises(LorafxError, match=r"changes the bias of q_proj.*bias = 'lora_only'"):
        lorafx.compile(Small(), {"a": folder})


def test_other_wavelets_are_refused_by_name(tmp_path: Path) -> None:
    config = peft.WaveFTConfig(n_frequency=30, wavelet_family="sym3", **TO)
    folder = save(Small(), config, tmp_path / "adapter")
    with pytest.raises(LorafxError, match="wavelet_family = 'sym3' is not read, only db1"):
        changed(Small(), AdapterSource(folder))
