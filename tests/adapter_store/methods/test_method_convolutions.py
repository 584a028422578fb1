"""LoHa, LoKr and LoCon of convolutions: by PEFT, and in LyCORIS's spelling with ΔW by hand."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from dense_merge import REFERENCE, TOLERANCE, error
from method_files import merged, save
from torch import Tensor, nn

import lorafx
from lorafx.adapter_store.checkpoint import components, load_state
from lorafx.adapter_store.saved import AdapterSource, read_source

pytestmark = pytest.mark.any_sizes


class Convolutions(nn.Module):
    """A kernel of 3, one of 1, a stride, and a linear: (B, 4, 8, 8) -> (B, 12)."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(4, 12, 3, padding=1)
        self.mix = nn.Conv2d(12, 12, 1)
        self.down = nn.Conv2d(12, 12, 3, stride=2, padding=1)
        self.out = nn.Linear(12, 12)

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.first, self.mix, self.down):
            x = layer(x).tanh()
        return self.out(x.mean((2, 3)))


NAMES = ["first", "mix", "down", "out"]
_TO = {"target_modules": NAMES}
CONFIGS: Mapping[str, peft.PeftConfig] = {
    "loha": peft.LoHaConfig(r=2, alpha=3, **_TO),
    "loha tucker": peft.LoHaConfig(r=2, alpha=3, use_effective_conv2d=True, **_TO),
    "lokr": peft.LoKrConfig(r=1, alpha=2, decompose_factor=2, **_TO),
    "lokr tucker": peft.LoKrConfig(r=1, alpha=2, use_effective_conv2d=True, **_TO),
    "adalora": peft.AdaLoraConfig(init_r=3, total_step=10, target_modules=NAMES[:3]),
    "lora": peft.LoraConfig(r=2, **_TO),
}


def rand(*shape: int) -> Tensor:
    return torch.randn(*shape) / 2


def loha(path: str, n: int, k: int, r: int = 2) -> tuple[dict[str, Tensor], Tensor]:
    w = {f"hada_w{i}_{x}": rand(*s) for i in "12" for x, s in (("a", (n, r)), ("b", (r, k)))}
    delta = (w["hada_w1_a"] @ w["hada_w1_b"]) * (w["hada_w2_a"] @ w["hada_w2_b"])
    return _named(path, w, 1.0), delta / r


def lokr(
    path: str, w1: tuple[int, ...], w2: tuple[int, ...], r: int = 2
) -> tuple[dict[str, Tensor], Tensor]:
    w = {"lokr_w1": rand(*w1), "lokr_w2_a": rand(w2[0], r), "lokr_w2_b": rand(r, *w2[1:])}
    return _named(path, w, 3.0), torch.kron(w["lokr_w1"], w["lokr_w2_a"] @ w["lokr_w2_b"]) * 3 / r


def lokr_whole(
    path: str, w1: tuple[int, ...], w2: tuple[int, ...]
) -> tuple[dict[str, Tensor], Tensor]:
    """Whose α counts for nothing."""
    w = {"lokr_w1": rand(*w1), "lokr_w2": rand(*w2)}
    first = w["lokr_w1"].reshape(*w1, *[1] * (len(w2) - 2))
    return _named(path, w, 7.0), torch.kron(first, w["lokr_w2"])


def locon(path: str, n: int, c: int, r: int = 2) -> tuple[dict[str, Tensor], Tensor]:
    w = {"lora_up": rand(n, r, 1, 1), "lora_mid": rand(r, r, 3, 3), "lora_down": rand(r, c, 1, 1)}
    up, down = w["lora_up"].flatten(1), w["lora_down"].flatten(1)
    delta = torch.einsum("oi,ijkl,jc->ockl", up, w["lora_mid"], down)
    return _named(path, {f"{name}.weight": t for name, t in w.items()}, 1.0), delta / r


def _named(path: str, tensors: Mapping[str, Tensor], alpha: float) -> dict[str, Tensor]:
    return {f"{path}.{k}": t for k, t in (tensors | {"alpha": torch.tensor(alpha)}).items()}


def lycoris(prefix: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A file of several methods, and ΔW by module."""
    torch.manual_seed(3)
    parts = {
        "first": locon(f"{prefix}first", 12, 4),
        "mix": lokr_whole(f"{prefix}mix", (1, 3), (12, 4, 1, 1)),
        "down": loha(f"{prefix}down", 12, 12 * 9),
        "out": lokr(f"{prefix}out", (3, 2), (4, 6)),
    }
    tensors = {key: t for part, _ in parts.values() for key, t in part.items()}
    return tensors, {name: delta for name, (_, delta) in parts.items()}


def of_full_rank() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A file with more numbers as factors than the weights have."""
    torch.manual_seed(4)
    parts = {
        "first": ({"first.diff": (diff := rand(12, 4, 3, 3))}, diff),
        "mix": lokr("mix", (3, 3), (4, 4), 4),
        "down": loha("down", 12, 12 * 9, 4),
    }
    tensors = {key: t for part, _ in parts.values() for key, t in part.items()}
    return tensors, {name: delta for name, (_, delta) in parts.items()}


@torch.no_grad()
def by_hand(base: nn.Module, deltas: Mapping[str, Tensor], m: Tensor | None = None) -> nn.Module:
    """`base` in float64 with ΔW added, and then DoRA's norms `m` (12,) of all weights."""
    twin = copy.deepcopy(base).double()
    for name, delta in deltas.items():
        weight = twin.get_submodule(name).weight
        weight += delta.double().reshape(weight.shape)
        if m is not None:
            scale = m.double() / weight.flatten(1).norm(dim=1)
            weight *= scale.reshape(-1, *[1] * (weight.dim() - 1))
    return twin


class Served:
    def __init__(self, root: Path) -> None:
        torch.manual_seed(0)
        self.base = Convolutions().eval().requires_grad_(False)
        folders = {n: save(self.base, c, root / n, 0.5) for n, c in CONFIGS.items()}
        self.exact: dict[str | None, nn.Module] = {
            n: merged(self.base, folder) for n, folder in folders.items()
        }
        self.exact[None] = copy.deepcopy(self.base).double()
        tensors, deltas = lycoris("lycoris_")
        self.exact["lycoris"] = by_hand(self.base, deltas)
        dora, m = lycoris("")[0], torch.rand(12) + 0.5
        for name in NAMES:
            dims = [1] * (self.base.get_submodule(name).weight.dim() - 1)
            dora[f"{name}.dora_scale"] = m.reshape(-1, *dims)
        self.exact["dora"] = by_hand(self.base, deltas, m)
        full, deltas = of_full_rank()
        self.exact["full"] = by_hand(self.base, deltas)
        full["first.diff_b"] = m
        self.exact["full"].first.bias.data += m
        adapters: dict[str, Any] = {**folders, "lycoris": tensors, "dora": dora, "full": full}
        self.cm = lorafx.compile(copy.deepcopy(self.base), adapters, options=REFERENCE)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Served:
    return Served(tmp_path_factory.mktemp("convolutions"))


@pytest.mark.parametrize(
    "names",
    [
        ["loha", None, "lora", "lycoris"],
        ["loha tucker", "lokr", "adalora", "lora"],
        ["lokr tucker", "dora", None, "loha"],
        ["full", None, "lora", "full"],
    ],
    ids=lambda names: names[0],
)
def test_convolutions_in_mixed_batches(served: Served, names: list[str | None]) -> None:
    torch.manual_seed(1)
    x = torch.randn(len(names), 4, 8, 8)
    captured = served.cm.recompiles
    got = served.cm(x, adapter_names=names)
    assert captured == 0 or served.cm.recompiles == captured
    for row, name in enumerate(names):
        want = served.exact[name](x[row : row + 1].double())[0]
        assert error(got[row].double(), want) <= TOLERANCE, name


def test_packed_projections_of_flux_in_the_names_of_its_first_implementation() -> None:
    """diffusers' conversion splits the factors as it does LoRA's."""
    model = pytest.importorskip("tiny_pipelines").flux_transformer()
    size = model.get_submodule("transformer_blocks.0.attn.to_q").in_features
    tensors, delta = loha("lora_unet_double_blocks_0_img_attn_qkv", 3 * size, size)
    state = load_state(tensors, model)
    assert len(state.tensors) == 6
    for name, part in zip(("to_q", "to_k", "to_v"), delta.split(size), strict=True):
        path = f"transformer_blocks.0.attn.{name}"
        a, b = (state.tensors[f"{path}.lora_{letter}.weight"] for letter in "AB")
        assert error(state.scales[path] * b @ a, part) <= TOLERANCE


@torch.no_grad()
def test_kernels_of_one_dimension(tmp_path: Path) -> None:
    base = nn.Sequential(nn.Conv1d(16, 12, 3, padding=1)).eval().requires_grad_(False)
    folders = {
        kind: save(base, config(r=1, target_modules=["0"]), tmp_path / kind, 0.5)
        for kind, config in (("loha", peft.LoHaConfig), ("lokr", peft.LoKrConfig))
    }
    x, names = torch.randn(3, 16, 9), ["loha", None, "lokr"]
    got = lorafx.compile(copy.deepcopy(base), folders, options=REFERENCE)(x, adapter_names=names)
    for row, name in enumerate(names):
        alone = base.double() if name is None else merged(base, folders[name])
        assert error(got[row].double(), alone(x[row : row + 1].double())[0]) <= TOLERANCE, name


def test_factors_of_rank_one() -> None:
    """B has one column, which is no kernel."""
    model = Convolutions()
    tensors, delta = loha("first", 12, 4 * 9, 1)
    small = {"mix.lora_down.weight": rand(1, 12), "mix.lora_up.weight": rand(12, 1)}
    state = load_state({**tensors, **small, "mix.alpha": torch.tensor(1.0)}, model)
    a, b = (state.tensors[f"first.lora_{letter}.weight"] for letter in "AB")
    assert a.shape == (1, 4, 3, 3)
    assert b.shape == (12, 1, 1, 1)
    assert error(state.scales["first"] * b.flatten(1) @ a.flatten(1), delta) <= TOLERANCE
    assert state.tensors["mix.lora_B.weight"].shape == (12, 1, 1, 1)


@pytest.mark.parametrize("make", [loha, locon], ids=["loha", "locon"])
def test_a_dilated_convolution_cannot_add_them(make: Callable[..., Any]) -> None:
    model = nn.Sequential(nn.Conv2d(4, 12, 3, padding="same", dilation=2), nn.Conv2d(12, 4, 1))
    cm = lorafx.compile(model, lorafx.LoraConfig(target_modules=["0", "1"], max_rank=8))
    tensors, _ = make("0", 12, 4 * 9 if make is loha else 4)
    with pytest.raises(lorafx.UnsupportedAdapterError, match="dilation"):
        cm.load_adapter(tensors, "a")
    assert cm.adapters == ()


OUTSIDE = {
    "mix.supertuning_values": rand(3),
    "mix.supertuning_indices": torch.tensor([1, 2, 144]),
    "mix.supertuning_lora_A": rand(2, 12),
    "mix.supertuning_lora_B": rand(12, 2),
}
BAD: dict[str, tuple[Any, str]] = {
    "positions": (
        AdapterSource(OUTSIDE, config={"peft_type": "SUPERTUNING", "target_modules": ["mix"]}),
        r"supertuning_indices .* mix has a weight of \(12, 12\), and its indices point outside",
    ),
    "sizes": (
        loha("down", 12, 12, 4)[0],
        r"hada_w1_a .*: down has a weight of \(12, 108\), .*\(12, 12\)",
    ),
    "norms": (
        lokr("down", (3, 3), (4, 36), 4)[0] | {"down.dora_scale": torch.ones(1, 108)},
        r"lokr_w1 .*: down cannot have a weight of its own .*merge the adapter",
    ),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("given", [True, False])
def test_what_no_convolution_can_have(case: str, given: bool) -> None:
    tensors, message = BAD[case]
    cm = lorafx.compile(Convolutions(), lorafx.LoraConfig(target_modules=NAMES))
    with pytest.raises(lorafx.CheckpointError, match=message):
        lorafx.compile(Convolutions(), {"a": tensors}) if given else cm.load_adapter(tensors, "a")
    assert cm.adapters == ()


def test_components_of_a_pipelines_file() -> None:
    tensors = loha("lora_unet_mix", 12, 12)[0] | lokr("lora_te_out", (3, 2), (4, 6))[0]
    saved = read_source(AdapterSource(tensors))
    assert components(saved, None) == ("unet", "text_encoder")
    model = Convolutions()
    config = lorafx.LoraConfig(target_modules=NAMES, max_rank=4)
    cm = lorafx.compile(model, config)
    cm.load_adapter(AdapterSource(saved, component="unet"), "a")
    assert cm.adapters == ("a",)
