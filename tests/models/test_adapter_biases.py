"""Biases of adapters (`lora_bias`, `bias`) in mixed batches, against PEFT's output of each row."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
from dense_merge import REFERENCE, PeftCase
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from slowly import few
from torch import Tensor, nn
from torch.nn import functional as F

import lorafx
from lorafx.errors import ConfigError, MatchError, UnsupportedAdapterError

pytestmark = pytest.mark.any_sizes


class Tower(nn.Module):
    """x (B, 6, L): a convolution, two linears of one input, a norm, a linear."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(6, 8, 3, padding=1)
        self.left, self.right = nn.Linear(8, 10), nn.Linear(8, 10, bias=False)
        self.norm = nn.LayerNorm(10)
        self.out = nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv(x).relu().mT
        return self.out(self.norm(self.left(h) * self.right(h).sigmoid()))


EVERY = ["conv", "left", "right", "out"]
CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {"target_modules": EVERY},
    "added": {"target_modules": EVERY, "lora_bias": True},
    "one": {"target_modules": ["left"], "lora_bias": True, "use_rslora": True},
    "replaced": {"target_modules": ["conv", "out"], "bias": "lora_only"},
    "both": {"target_modules": ["left", "out"], "bias": "lora_only", "lora_bias": True},
    "scaled": {"target_modules": ["conv", "left"], "bias": "lora_only", "use_dora": True},
}


@torch.no_grad()
def save(base: nn.Module, folder: Path, trained: str = "", **config: Any) -> Path:
    """An adapter by PEFT, with non-zero factors, and biases where it trains them, or `trained`."""
    wrapped = get_peft_model(copy.deepcopy(base), LoraConfig(r=3, lora_alpha=5, **config))
    generator = torch.Generator().manual_seed(len(folder.name))
    for name, parameter in wrapped.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if "magnitude" in name:
            parameter.mul_(1 + 0.3 * noise)
        elif "lora_" in name:
            parameter.copy_(0.5 * noise)
        elif name.endswith(trained or ".base_layer.bias") and "bias" in config:
            parameter.add_(noise)
    wrapped.save_pretrained(str(folder))
    return folder


def tower() -> nn.Module:
    torch.manual_seed(0)
    return Tower().eval().requires_grad_(False)


@pytest.fixture(scope="module")
def base() -> nn.Module:
    return tower()


@pytest.fixture(scope="module")
def folders(base: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("adapters")
    return {name: save(base, folder / name, **config) for name, config in CONFIGS.items()}


@pytest.fixture(scope="module")
def cm(base: nn.Module, folders: dict[str, Path]) -> Any:
    return lorafx.compile(copy.deepcopy(base), folders, options=REFERENCE)


def check(cm: Any, base: nn.Module, folders: dict[str, Path], names: list[str | None]) -> None:
    x = torch.randn(len(names), 6, 5)
    found = cm(x, adapter_names=names)
    oracle.assert_close(found, [PeftCase(base, folders).expected(names, {"x": x})])
    first = next(filter(None, names))
    others = cm(x, adapter_names=[name and first for name in names])  # by the same graph
    for row, name in enumerate(names):
        if name is None:
            assert torch.equal(found[row], others[row])


def test_rows_of_one_batch(cm: Any, base: nn.Module, folders: dict[str, Path]) -> None:
    names: list[str | None] = [*CONFIGS, None]
    check(cm, base, folders, names)
    compiled = cm.recompiles
    check(cm, base, folders, names[::-1])
    check(cm, base, folders, ["both", "plain", "both"])
    assert cm.recompiles == compiled
    check(cm, base, folders, ["replaced"])


def test_new_base_weights(base: nn.Module, folders: dict[str, Path]) -> None:
    """A bias in the place of the base's stays what it is; one that is added moves with it."""
    cm = lorafx.compile(copy.deepcopy(base), folders, options=REFERENCE, dynamic=False)
    changed = tower()
    for parameter in changed.parameters():
        parameter.mul_(1.25)
    cm.load_weights(changed.state_dict())
    check(cm, changed, folders, ["added", None, "replaced", "both", "scaled"])


@pytest.mark.parametrize("name", ["replaced", "both"])
def test_merging(
    cm: Any, base: nn.Module, folders: dict[str, Path], name: str, tmp_path: Path
) -> None:
    x = torch.randn(2, 6, 5)
    with torch.no_grad():
        want = oracle.by_peft(base, folders[name])(x)
    before = {key: value.clone() for key, value in cm._orig_mod.state_dict().items()}
    cm.merge(name)
    try:
        with pytest.raises(ConfigError, match="has biases in the place of the base's own"):
            cm.load_adapter(folders["replaced"], "another")
        oracle.assert_close(cm(x, adapter_names=[name, name]), [want])
    finally:
        cm.unmerge()
    assert all(torch.equal(before[key], value) for key, value in cm._orig_mod.state_dict().items())
    cm.export_merged(name, tmp_path)
    exported = tower()
    exported.load_state_dict(load_file(next(tmp_path.glob("*.safetensors"))))
    oracle.assert_close(exported(x), [want])


def test_sums_and_some_merges_are_refused(cm: Any) -> None:
    with pytest.raises(ConfigError, match="'added' was trained with biases"):
        cm(torch.randn(1, 6, 5), adapter_names=[{"added": 0.5, "plain": 1.0}])
    with pytest.raises(MatchError, match=r"right: .* the base has no parameter to merge it into"):
        cm.merge("added")
    assert str(cm.explain()).count("and biases") == 1


def test_biases_of_the_whole_model(base: nn.Module, tmp_path: Path) -> None:
    """Those of linears that are sites are served, those of a norm are refused by name."""
    config: dict[str, Any] = {"target_modules": ["left"], "bias": "all"}
    folders = {"all": save(base, tmp_path / "all", trained="out.bias", **config)}
    sites = lorafx.LoraConfig(target_modules=EVERY)
    cm = lorafx.compile(
        copy.deepcopy(base), sites, adapters=folders, options=REFERENCE, dynamic=False
    )
    check(cm, base, folders, ["all", None])
    with pytest.raises(UnsupportedAdapterError, match=r"bias of out \(Linear\) was trained"):
        lorafx.compile(copy.deepcopy(base), folders, options=REFERENCE, dynamic=False)
    norm = save(base, tmp_path / "norm", trained="norm.bias", **config)
    with pytest.raises(UnsupportedAdapterError, match=r"bias of norm \(LayerNorm\) was trained"):
        cm.load_adapter(norm, "norm")


class Uses(nn.Module):
    def __init__(self, use: Callable[[nn.Linear, Tensor], Tensor]) -> None:
        super().__init__()
        self.w, self.use = nn.Linear(6, 6), use

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.use(self.w, x))


#: How a bias is used beside its module's call, and why an adapter's cannot take its place there.
USES: dict[str, tuple[Callable[[nn.Linear, Tensor], Tensor], str]] = {
    "by function": (lambda w, x: F.linear(x, w.weight, w.bias), ""),
    "added later": (lambda w, x: x @ w.weight.T + w.bias, ""),
    "left out": (lambda w, x: F.linear(x, w.weight), ""),
    "tangent": (lambda w, x: sum(torch.func.jvp(w, (x,), (x.cos(),))), ""),
    "twice": (lambda w, x: w(x) + w.bias, "its bias is used by"),
    "elsewhere": (lambda w, x: w(x) + w.bias * x, "its bias is used by"),
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("start", few(["eager", "compiled"], "compiled"))
def test_uses_of_a_bias_past_its_module(use: str, start: str, tmp_path: Path) -> None:
    function, reason = USES[use]
    torch.manual_seed(0)
    model = Uses(function).eval().requires_grad_(False)
    config = {"target_modules": ["w"], "bias": "lora_only"}
    adapters = {name: save(model, tmp_path / name, **config) for name in ("a", "bb")}
    wanted = oracle.Oracle.of(model, adapters)
    x, names = torch.randn(3, 4, 6), ["a", None, "bb"]
    options = {**REFERENCE, "start": start, "cache": None}
    cm = lorafx.compile(model, adapters, options=options, dynamic=False)
    if not reason:
        return oracle.assert_close(cm(x=x, adapter_names=names), wanted.rows(names, {"x": x}))
    with pytest.raises(MatchError, match=reason):
        cm(x=x, adapter_names=names)
