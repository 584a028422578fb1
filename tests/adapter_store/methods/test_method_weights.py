"""Methods that give a weight of its own, against what PEFT merges in float64 and gives unmerged,
and by LyCORIS's formulas."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from method_files import damage, merged, save
from torch import Tensor, nn

import lorafx
from lorafx.adapter_store.checkpoint import load_state
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
    "oft": peft.OFTConfig(oft_block_size=4, **EVEN),
    "oft cayley": peft.OFTConfig(oft_block_size=4, use_cayley_neumann=False, **EVEN),
    "oft two terms": peft.OFTConfig(r=2, oft_block_size=0, num_cayley_neumann_terms=2, **EVEN),
    "oft three terms": peft.OFTConfig(oft_block_size=4, num_cayley_neumann_terms=3, **EVEN),
    "oft shared": peft.OFTConfig(oft_block_size=4, block_share=True, **EVEN),
    "coft": peft.OFTConfig(oft_block_size=4, coft=True, eps=0.1, **EVEN),
    "ia3": peft.IA3Config(feedforward_modules=["down_proj"], **EVEN),
    "ia3 pattern": peft.IA3Config(feedforward_modules=r".*down_proj", **EVEN),
    "hra": peft.HRAConfig(r=3, **EVEN),
    "hra basis": peft.HRAConfig(r=3, apply_GS=True, **EVEN),
    "road 1": peft.RoadConfig(variant="road_1", group_size=4, **EVEN),
    "road 2": peft.RoadConfig(variant="road_2", group_size=4, **EVEN),
    "road 4": peft.RoadConfig(variant="road_4", group_size=2, **EVEN),
    "deft": peft.DeftConfig(r=3, **EVEN),
    "deft alpha": peft.DeftConfig(r=3, alpha=6, **EVEN),
    "deft qr": peft.DeftConfig(r=3, decomposition_method="qr", **EVEN),
    "deft over N": peft.DeftConfig(r=9, decomposition_method="qr", alpha=4, **EVEN),
    "para": peft.DeftConfig(r=3, para=True, **EVEN),
    "para qr": peft.DeftConfig(r=3, para=True, decomposition_method="qr", **EVEN),
    "beft": peft.BeftConfig(target_modules=["q_proj"]),
    "frod": peft.FrodConfig(sparse_rate=0.1, progressbar=False, **EVEN),
    "osf": peft.OSFConfig(effective_rank=3, **EVEN),
    "osf pattern": peft.OSFConfig(effective_rank=3, rank_pattern={"q_proj": 0.5}, **EVEN),
    "peanut": peft.PeanutConfig(r=3, scaling=1.5, **EVEN),
    "peanut deep": peft.PeanutConfig(r=3, depth=2, act_fn="gelu", **EVEN),
    "kasa": peft.LoraConfig(r=3, lora_alpha=5, kasa_config=peft.KasaConfig(), **EVEN),
    "boft": peft.BOFTConfig(boft_block_size=4, **EVEN),
    "boft blocks": peft.BOFTConfig(boft_block_size=0, boft_block_num=2, **EVEN),
    "boft odd": peft.BOFTConfig(boft_block_size=1, **EVEN),
    "boft 2": peft.BOFTConfig(boft_block_size=2, boft_n_butterfly_factor=2, **EVEN),
    "boft 3": peft.BOFTConfig(boft_block_size=2, boft_n_butterfly_factor=3, **EVEN),
    "boft 4": peft.BOFTConfig(
        boft_block_size=2, boft_n_butterfly_factor=4, target_modules=["q_proj"]
    ),
}


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
        torch.testing.assert_close(got.state_dict()[key], tensor, rtol=1e-5, atol=1e-6)
    twin: Any = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(folder)).eval()
    x = torch.randn(3, 16)
    torch.testing.assert_close(got(x.double()).float(), twin(x), rtol=1e-4, atol=1e-5)


def rand(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


@pytest.mark.parametrize(
    ("prefix", "norms"),
    [("lora_unet_", None), ("lycoris_", (8, 1)), ("diffusion_model.", (1, 16))],
)
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


@pytest.mark.parametrize(("i", "j"), [(1, 2), (2, 1)])  # (2, 1): files of older versions
def test_glora_of_lycoris(i: int, j: int) -> None:
    base = Small().double()
    a, c, b, d = rand(16, 2), rand(2, 16), rand(8, 2), rand(2, 16)
    named = {f"a{i}": a, f"a{j}": c, f"b{i}": b, f"b{j}": d}
    tensors = {f"lycoris_q_proj.{name}.weight": tensor for name, tensor in named.items()}
    tensors["lycoris_q_proj.alpha"] = torch.tensor(6.0)
    got, weight = changed(base, AdapterSource(tensors)), base.q_proj.weight
    torch.testing.assert_close(got.q_proj.weight, weight + 3 * (weight @ a @ c + b @ d))
    for name, tensor, message in (
        ("b1", None, r"lycoris_q_proj has no b1"),
        (f"b{j}", rand(2, 15), rf"b{j}.weight has shape \(2, 15\), it needs \(2, 16\)"),
        (f"a{j}", torch.full((2, 16), torch.nan), rf"a{j}.weight holds 32 NaN"),
        (f"a{i}", rand(16, 2, 1, 1), r"has shape \(16, 2, 1, 1\)"),
    ):
        key = f"lycoris_q_proj.{name}.weight"
        others = {k: t for k, t in tensors.items() if k != key}
        refused(AdapterSource(others if tensor is None else {**others, key: tensor}), message)


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


@pytest.mark.parametrize(
    ("prefix", "stages", "scaled", "alpha"),
    [
        ("lycoris_", (), False, 0.0),
        ("oft_unet_", (), True, 0.05),
        ("lora_unet_", (1,), True, 0.05),
        ("lycoris_", (2,), True, 0.05),
        ("lora_unet_", (2,), False, 0.0),
    ],
)
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


OF_LYCORIS: list[tuple[str, Tensor | None, str]] = [
    ("diff", torch.ones(8), r"q_proj.diff has shape \(8,\): .*norms"),
    ("lora_up.weight", torch.ones(8, 2), r"q_proj has lora_up, which mean"),
    ("diff_b", torch.ones(7), r"q_proj.diff_b has shape \(7,\), it needs \(8\)"),
    ("diff", torch.full((8, 16), torch.nan), r"q_proj.diff holds 128 NaN"),
    ("alpha", None, r"lycoris_q_proj has no alpha, LyCORIS's constraint"),
    ("rescale", torch.ones(8, 1, 1, 1), r"rescale has shape \(8, 1, 1, 1\)"),
    ("rescale", torch.ones(1, 8), r"it needs \(8, 1\)"),
    ("oft_blocks", torch.ones(4, 4, 2, 2), r"no butterfly of 4 stages"),
    ("oft_blocks", torch.full((4, 2, 2), torch.nan), r"oft_blocks holds 16 NaN"),
    ("oft_blocks", torch.ones(3, 2, 2), r"rescale has shape \(8, 1\)"),
]


@pytest.mark.parametrize(("end", "tensor", "message"), OF_LYCORIS)
def test_a_file_of_lycoris_that_cannot_be_meant_is_refused(
    end: str, tensor: Tensor | None, message: str
) -> None:
    tensors = lycoris("lycoris_", scaled=True, alpha=0.1)
    if end in ("diff", "diff_b", "lora_up.weight"):
        tensors = {"lycoris_q_proj.diff": torch.ones(8, 16)}
    tensors.pop(f"lycoris_q_proj.{end}", None)
    if tensor is not None:
        tensors[f"lycoris_q_proj.{end}"] = tensor
    refused(AdapterSource(tensors), message)


def refused(source: AdapterSource, message: str) -> None:
    with pytest.raises(LorafxError, match=message):
        lorafx.compile(Small(), {"a": source})


NAN = torch.full((3, 16), torch.nan)
#: The method, the end of a key, what it is instead (None: absent), the message.
HOSTILE: list[tuple[str, str, Tensor | None, str]] = [
    ("hira", "q_proj.hira_A", torch.ones(7, 5), r"hira_[AB] has shape"),
    ("hira", "q_proj.hira_A", NAN, r"q_proj.hira_A holds 48 NaN"),
    ("bat", "q_proj.miss_block", torch.ones(2, 4, 3), r"miss_block has shape"),
    ("bat", "q_proj.miss_block", torch.ones(4, 2, 2), r"rank 2, .* says 4"),
    ("randlora", "base_model.randlora_A", torch.ones(3, 2, 12), r"randlora_A has shape"),
    ("randlora", "odd.randlora_gamma", torch.ones(3, 6), r"\(7, 12\), and randlora_gamma is for 6"),
    (
        "randlora",
        "odd.randlora_gamma",
        torch.ones(9, 7),
        r"gamma.* needs \(3, smaller",
    ),
    ("randlora", "odd.randlora_lambda", None, r"odd has no randlora_lambda"),
    ("glora", "odd.glora_A.Xu", None, r"odd has no glora_A.Xu"),
    ("glora", "odd.glora_A.Xu", torch.ones(3, 9), r"glora_B.Xu has shape \(3, 12\)"),
    ("glora", "odd.glora_D.X", torch.ones(5), r"glora_D.X has shape \(5,\)"),
    ("glora constants", "q_proj.glora_C.zeros", torch.ones(16, 1), r"C.zeros .*not 0"),
    (
        "fourierft",
        "q_proj.fourierft_spectrum",
        torch.ones(129),
        r"\(8, 16\), which has no room for 129",
    ),
    ("waveft", "odd.waveft_spectrum", torch.ones(3, 3), r"odd.waveft_spectrum has shape"),
    (
        "shira",
        "odd.shira_indices",
        torch.full((2, 38), 7),
        r"shira_indices .*\(7, 12\), and its indices point outside",
    ),
    ("shira", "odd.shira_indices", torch.ones(3, 38).int(), r"needs \(2, 38\)"),
    ("shira", "odd.shira_indices", torch.ones(2, 38), r"indices is torch.float32"),
    ("shira", "odd.shira_weight", None, r"odd has no shira_weight"),
    ("supra", "odd.supertuning_indices", -torch.ones(16).int(), r"indices point outside"),
    ("supra", "odd.supertuning_indices", torch.ones(9).int(), r"has shape \(9,\)"),
    ("supra", "odd.supertuning_indices", None, r"save_precomputed_indices=True"),
    ("supra", "odd.supertuning_lora_B", None, r"odd has no supertuning_lora_B"),
    ("oft", "q_proj.oft_R.weight", torch.ones(4, 5), r"oft_R.weight has shape \(4, 5\)"),
    ("hra", "q_proj.hra_u", torch.full((16, 3), torch.nan), r"hra_u holds 48 NaN"),
    ("hra", "q_proj.hra_u", torch.zeros(16, 3), r"q_proj.hra_u has a column of zeros"),
    (
        "ia3",
        "q_proj.ia3_l",
        torch.ones(1, 8),
        r"ia3_l has shape \(1, 8\), it needs \(N by feedforward",
    ),
    ("road 1", "q_proj.road_alpha", None, r"q_proj has no road_alpha"),
    ("road 1", "q_proj.road_theta", torch.ones(3), r"road_(theta|alpha) has shape"),
    ("boft", "q_proj.boft_R", torch.ones(1, 4, 4, 3), r"boft_R has shape \(1, 4, 4, 3\)"),
    ("boft", "q_proj.boft_R", torch.ones(4, 4, 2, 2), r"4 blocks of 2 are no butt"),
    ("boft", "q_proj.boft_s", None, r"q_proj has no boft_s"),
    ("boft", "q_proj.boft_s", torch.ones(8, 2), r"boft_s has shape \(8, 2\)"),
    ("boft", "q_proj.boft_s", torch.full((8, 1), torch.nan), r"boft_s holds 8 NaN"),
    ("deft", "q_proj.deft_R", None, r"q_proj has no deft_R"),
    ("para", "q_proj.deft_P", torch.ones(8, 9), r"\(8, 9\), r is over N"),
    ("deft qr", "q_proj.deft_R", torch.ones(2, 16), r"deft_[PR] has shape .*it needs"),
    ("deft qr", "q_proj.deft_P", torch.full((8, 3), torch.nan), r"deft_P holds 24 NaN"),
    ("beft", "q_proj.beft_bias", torch.ones(2, 8), r"beft_bias has shape \(2, 8\)"),
    ("frod", "frod_V.q_proj", None, r"no frod_V.q_proj.*save_projection=True"),
    (
        "frod",
        "frod_s_indices.q_proj",
        torch.full((2, 25), 16),
        r"indices.q_proj points outside of the 16",
    ),
    ("frod", "q_proj.frod_lambda_s_values", torch.ones(3), r"s_values has shape \(3,\)"),
    ("osf", "q_proj.osf_svd_params.S_low", None, r"no osf_svd_params.S_low"),
    ("osf", "q_proj.osf_svd_params.U_low", torch.ones(8, 4), r"S_low has shape \(5,\)"),
    ("peanut deep", "q_proj.peanut_decoders.1.weight", None, r"no peanut_decoders.1"),
    (
        "peanut deep",
        "q_proj.peanut_decoders.1.weight",
        torch.ones(3, 4),
        r"peanut_decoders.1.weight has shape \(3, 4\)",
    ),
    ("kasa", "q_proj.lora_diag", None, r"q_proj has no lora_diag"),
    ("kasa", "q_proj.lora_A.weight", torch.ones(8, 16), r"it needs \("),
    ("kasa", "q_proj.lora_diag", torch.ones(3, 1), r"lora_diag has shape \(3, 1\)"),
]


@pytest.mark.parametrize(("name", "end", "tensor", "message"), HOSTILE)
def test_a_file_that_cannot_be_meant_is_refused(
    name: str, end: str, tensor: Tensor | None, message: str, tmp_path: Path
) -> None:
    folder = save(Small(), CONFIGS[name], tmp_path / "adapter")
    damage(folder, end, tensor)
    refused(AdapterSource(folder), message)


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
    refused(AdapterSource(folder), r"changes the bias of q_proj.*bias = 'lora_only'")


class TwoHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.aux = nn.ModuleDict({"head": nn.Linear(8, 32)})
        self.head = nn.Linear(8, 6)

    def forward(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        return self.head(input_ids), self.aux["head"](input_ids)


@torch.no_grad()
def test_room_for_a_path_is_not_room_for_its_suffix(tmp_path: Path) -> None:
    """A file names the module at "head"; a user's "head" names "aux.head", too."""
    base = TwoHeads().eval()
    model = peft.get_peft_model(
        copy.deepcopy(base),
        peft.FourierFTConfig(n_frequency=20, target_modules="head", scaling=10.0),
    )
    model.save_pretrained(tmp_path)
    merged_model, x = model.merge_and_unload(), torch.randn(3, 8)
    for names, rooms in (([], {"head": 6}), (["head"], {"head": 6, "aux.head": 32})):
        config = lorafx.LoraConfig(target_modules="head", modules_to_save=names)
        options = {"lowering": "reference"}
        cm = lorafx.compile(copy.deepcopy(base), config, adapters={"a": tmp_path}, options=options)
        assert {s.path: s.own_rows for s in cm._session.program.sites if s.own_rows} == rooms
        got = cm(x, adapter_names=["a", None, "a"])
        for row, alone in enumerate((merged_model, base, merged_model)):
            for ours, want in zip(got, alone(x[row : row + 1]), strict=True):
                torch.testing.assert_close(ours[row : row + 1], want, rtol=1e-5, atol=1e-5)
