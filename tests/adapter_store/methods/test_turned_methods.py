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
from method_files import damage, merged, save
from torch import Tensor, nn

import lorafx
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
    "deft": peft.DeftConfig(r=3, **TO),
    "deft alpha": peft.DeftConfig(r=3, alpha=6, **TO),
    "deft qr": peft.DeftConfig(r=3, decomposition_method="qr", **TO),
    "deft over N": peft.DeftConfig(r=9, decomposition_method="qr", alpha=4, **TO),
    "para": peft.DeftConfig(r=3, para=True, **TO),
    "para qr": peft.DeftConfig(r=3, para=True, decomposition_method="qr", **TO),
    "beft": peft.BeftConfig(target_modules=["q_proj"]),
    "frod": peft.FrodConfig(sparse_rate=0.1, progressbar=False, **TO),
    "osf": peft.OSFConfig(effective_rank=3, **TO),
    "osf pattern": peft.OSFConfig(effective_rank=3, rank_pattern={"q_proj": 0.5}, **TO),
    "peanut": peft.PeanutConfig(r=3, scaling=1.5, **TO),
    "peanut deep": peft.PeanutConfig(r=3, depth=2, act_fn="gelu", **TO),
    "kasa": peft.LoraConfig(r=3, lora_alpha=5, kasa_config=peft.KasaConfig(), **TO),
    "boft": peft.BOFTConfig(boft_block_size=4, **TO),
    "boft blocks": peft.BOFTConfig(boft_block_size=0, boft_block_num=2, **TO),
    "boft odd": peft.BOFTConfig(boft_block_size=1, **TO),
    "boft 2": peft.BOFTConfig(boft_block_size=2, boft_n_butterfly_factor=2, **TO),
    "boft 3": peft.BOFTConfig(boft_block_size=2, boft_n_butterfly_factor=3, **TO),
    "boft 4": peft.BOFTConfig(
        boft_block_size=2, boft_n_butterfly_factor=4, target_modules=["q_proj"]
    ),
}
CLOSE = {"rtol": 1e-5, "atol": 1e-6}


class Diagonals:
    """What PEFT's CUDA extension computes, without which it has butterflies of one factor alone."""

    @staticmethod
    def apply(blocks: Tensor) -> Tensor:
        return torch.stack([torch.block_diag(*stage) for stage in blocks])


@pytest.fixture(autouse=True)
def _butterflies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peft.tuners.boft.layer, "get_fbd_cuda", lambda: True)
    monkeypatch.setattr(peft.tuners.boft.layer, "FastBlockDiag", Diagonals)


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
        keys = [k for k in saved.made if re.search(rf"{place}\.lora_([AW]|down)", k)]
        if not keys:
            continue
        (key,) = keys
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
    assert any(
        not torch.allclose(tensor, base.state_dict()[key].double())
        for key, tensor in got.state_dict().items()
    )
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


def lycoris(prefix: str, *stages: int, scaled: bool, alpha: float) -> dict[str, Tensor]:
    """A file of LyCORIS with blocks (*stages, blocks, 2, 2) of both modules."""
    torch.manual_seed(1)
    tensors: dict[str, Tensor] = {}
    for name, outputs in (("q_proj", 8), ("down_proj", 12)):
        tensors[f"{prefix}{name}.oft_blocks"] = torch.randn(*stages, outputs // 2, 2, 2)
        tensors[f"{prefix}{name}.alpha"] = torch.tensor(alpha)
        if scaled:
            tensors[f"{prefix}{name}.rescale"] = torch.randn(outputs, 1)
    return tensors


def by_hand(weight: Tensor, name: str, tensors: dict[str, Tensor]) -> Tensor:
    """W′ by LyCORIS's formulas, of matrices (N, N)."""
    of = {key.rpartition(".")[2]: t.double() for key, t in tensors.items() if name in key}
    q = of["oft_blocks"] - of["oft_blocks"].mT
    limit = of["alpha"] * len(weight)
    if limit and q.norm() > limit:
        q = q * limit / q.norm()
    eye = torch.eye(2).double()
    turns = (eye + q) @ torch.linalg.inv(eye - q)
    whole = torch.eye(len(weight)).double()
    if q.dim() == 3:
        weight = torch.block_diag(*turns.mT) @ weight
    for i, blocks in enumerate(turns if q.dim() == 4 else ()):
        half = 2**i
        order = [
            start + j + side * half
            for start in range(0, len(weight), 2 * half)
            for j in range(half)
            for side in (0, 1)
        ]
        weight = whole[order].T @ torch.block_diag(*blocks) @ whole[order] @ weight
    return weight * of.get("rescale", 1)


@pytest.mark.parametrize("prefix", ["lycoris_", "lora_unet_", "oft_unet_"])
@pytest.mark.parametrize("stages", [(), (1,), (2,)])
@pytest.mark.parametrize(("scaled", "alpha"), [(False, 0.0), (True, 0.05)])
@pytest.mark.usefixtures("in_eager_mode")
def test_files_of_lycoris_mean_its_formulas(
    prefix: str, stages: tuple[int, ...], scaled: bool, alpha: float
) -> None:
    base = Small().eval()
    tensors = lycoris(prefix, *stages, scaled=scaled, alpha=alpha)
    cm: Any = lorafx.compile(copy.deepcopy(base), adapters={"a": AdapterSource(tensors)})
    for module, name in ((base.q_proj, "q_proj"), (base.down_proj, "down_proj")):
        module.weight.data = by_hand(module.weight.double(), name, tensors).float()
    x = torch.randn(3, 16)
    torch.testing.assert_close(cm(x, adapter_names=["a"] * 3), base(x), rtol=1e-4, atol=1e-5)


OF_LYCORIS = {
    "alpha": ("q_proj.alpha", None, r"lycoris_q_proj has no alpha, LyCORIS's constraint"),
    "scales": ("q_proj.rescale", torch.ones(8, 1, 1, 1), r"rescale has shape \(8, 1, 1, 1\)"),
    "row of scales": ("q_proj.rescale", torch.ones(1, 8), r"it needs \(8, 1\)"),
    "stages": ("q_proj.oft_blocks", torch.ones(4, 4, 2, 2), r"no butterfly of 4 stages"),
    "nan": ("q_proj.oft_blocks", torch.full((4, 2, 2), torch.nan), r"oft_blocks holds 16 NaN"),
    "outputs": ("q_proj.oft_blocks", torch.ones(3, 2, 2), r"rescale has shape \(8, 1\)"),
}


@pytest.mark.parametrize("case", OF_LYCORIS)
def test_a_file_of_lycoris_that_cannot_be_meant_is_refused(case: str) -> None:
    end, tensor, message = OF_LYCORIS[case]
    tensors = lycoris("lycoris_", scaled=True, alpha=0.1)
    del tensors[f"lycoris_{end}"]
    if tensor is not None:
        tensors[f"lycoris_{end}"] = tensor
    with pytest.raises(LorafxError, match=message):
        as_factors(read_source(AdapterSource(tensors)), Small())


HOSTILE = {
    "shape": ("oft", "q_proj.oft_R.weight", torch.ones(4, 5), r"oft_R.weight has shape \(4, 5\)"),
    "nan": ("hra", "q_proj.hra_u", torch.full((16, 3), torch.nan), r"hra_u holds 48 NaN"),
    "zeros": ("hra", "q_proj.hra_u", torch.zeros(16, 3), r"q_proj.hra_u has a column of zeros"),
    "other side": ("ia3", "q_proj.ia3_l", torch.ones(1, 8), r"q_proj.ia3_l has shape \(1, 8\)"),
    "half": ("road 1", "q_proj.road_alpha", None, r"q_proj has no road_alpha"),
    "groups": ("road 1", "q_proj.road_theta", torch.ones(3), r"road_(theta|alpha) has shape"),
    "square": ("boft", "q_proj.boft_R", torch.ones(1, 4, 4, 3), r"boft_R has shape \(1, 4, 4, 3\)"),
    "no butterfly": ("boft", "q_proj.boft_R", torch.ones(4, 4, 2, 2), r"4 blocks of 2 are no butt"),
    "no scales": ("boft", "q_proj.boft_s", None, r"q_proj has no boft_s"),
    "scales": ("boft", "q_proj.boft_s", torch.ones(8, 2), r"boft_s has shape \(8, 2\)"),
    "boft nan": ("boft", "q_proj.boft_s", torch.full((8, 1), torch.nan), r"boft_s holds 8 NaN"),
    "no R": ("deft", "q_proj.deft_R", None, r"q_proj has no deft_R"),
    "rank over N": ("para", "q_proj.deft_P", torch.ones(8, 9), r"\(8, 9\), r is over N"),
    "R": ("deft qr", "q_proj.deft_R", torch.ones(2, 16), r"deft_[PR] has shape .*it needs"),
    "deft nan": ("deft qr", "q_proj.deft_P", torch.full((8, 3), torch.nan), r"deft_P holds 24 NaN"),
    "rows": ("beft", "q_proj.beft_bias", torch.ones(2, 8), r"beft_bias has 2 rows"),
    "no V": ("frod", "frod_V.q_proj", None, r"no frod_V.q_proj.*save_projection=True"),
    "outside": ("frod", "frod_s_indices.q_proj", torch.full((2, 25), 16), r"two rows of .* 15"),
    "entries": ("frod", "q_proj.frod_lambda_s_values", torch.ones(3), r"s_values has shape \(3,\)"),
    "no singular values": ("osf", "q_proj.osf_svd_params.S_low", None, r"no osf_svd_params.S_low"),
    "sizes": ("osf", "q_proj.osf_svd_params.U_low", torch.ones(8, 4), r"S_low has shape \(5,\)"),
    "no decoder": ("peanut deep", "q_proj.peanut_decoders.1.weight", None, r"no peanut_decoders.1"),
    "wide decoder": (
        "peanut deep",
        "q_proj.peanut_decoders.1.weight",
        torch.ones(3, 4),
        r"peanut_decoders.1.weight has shape \(3, 4\)",
    ),
    "no diagonal": ("kasa", "q_proj.lora_diag", None, r"q_proj has no lora_diag"),
    "all parts": ("kasa", "q_proj.lora_A.weight", torch.ones(8, 16), r"it needs \("),
    "diagonal": ("kasa", "q_proj.lora_diag", torch.ones(3, 1), r"lora_diag has shape \(3, 1\)"),
    "projection": ("vera", "vera_A", None, r"no vera_A.*save_projection=True"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_file_that_cannot_be_meant_is_refused(case: str, tmp_path: Path) -> None:
    name, end, tensor, message = HOSTILE[case]
    base = Small().eval()
    folder = save(base, CONFIGS[name], tmp_path / "adapter")
    damage(folder, end, tensor)
    with pytest.raises(LorafxError, match=message):
        changed(base, folder)
