"""LoRA on convolutions in mixed batches, against PEFT's own output of each row alone."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
import torch.nn.functional as F
from attached import EAGER
from dense_merge import REFERENCE, PeftCase, check_mixed
from torch import Tensor, nn

import lorafx
from lorafx.errors import MatchError, ProvenanceError

pytestmark = pytest.mark.any_sizes


class Pyramid(nn.Module):
    """x (B, 4, L), L a multiple of four: convolutions of one, two and three dimensions."""

    def __init__(self, **second: Any) -> None:
        super().__init__()
        self.c1 = nn.Conv1d(4, 8, 3, stride=2, padding=1)
        self.c2 = nn.Conv2d(8, 8, (3, 2), **{"padding": "same", **second})
        self.norm = nn.BatchNorm2d(8)
        self.c3 = nn.Conv3d(2, 6, 2, bias=False)
        self.out = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = self.c1(x).relu().unflatten(2, (2, -1))
        h = self.norm(self.c2(h)).relu().unflatten(1, (2, 4))
        return self.out(self.c3(h).relu().movedim(1, -1))


#: By name of the adapter: its targets and rank.
PLANS: dict[str, tuple[list[str], int]] = {
    "ends": (["c1", "c2", "out"], 2),
    "middle": (["c2", "c3"], 4),
    "all": (["c1", "c2", "c3", "out"], 6),
    "scaled": (["c1", "c2"], 4),  # DoRA
}
NAMES = ["ends", None, "middle", "all", "scaled", "ends"]


class Served(PeftCase):
    """A model compiled with the adapters of `PLANS`."""

    def __init__(self, base: nn.Module, folder: Path) -> None:
        super().__init__(base.eval().requires_grad_(False), {})
        for name, (targets, rank) in PLANS.items():
            own = {"seed": 9} if name == "middle" else {"seed": rank, "use_dora": rank == 4}
            self.folders[name] = oracle.save_adapter(
                base, folder / name, rank=rank, targets=targets, **own
            )
        self.cm: Any = self.compile()

    def check(self, x: Tensor, names: Sequence[str | None]) -> None:
        check_mixed(self.cm, self, names, {"x": x})


def seeded(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return make()


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Served:
    return Served(seeded(Pyramid), tmp_path_factory.mktemp("plain"))


def test_rows_of_one_batch(served: Served) -> None:
    x = torch.randn(6, 4, 16)
    served.check(x, NAMES)
    compiled, others = served.cm.recompiles, ["all", None, "ends", "scaled", "all", "middle"]
    served.check(x, others)
    found = [served.cm(x, adapter_names=names)[1] for names in (NAMES, others)]
    assert torch.equal(*found)
    served.check(x, NAMES[::-1])
    served.check(torch.randn(5, 4, 16), [None, "all", "all", "scaled", "middle"])
    assert served.cm.recompiles == compiled
    served.check(torch.randn(1, 4, 16), ["all"])
    served.check(torch.randn(1, 4, 16), ["scaled"])


def test_in_eager_mode_and_warm(served: Served) -> None:
    """Marks alone serve batches of one adapter; dummy adapters fit convolutions."""
    model, x = copy.deepcopy(served.base), torch.randn(2, 4, 16)
    lorafx.attach(model, served.folders)
    for name in ("all", "scaled"):
        with lorafx.adapters(model, name), EAGER():
            oracle.assert_close(model(x), [served.alone(name)(x)])
    with pytest.raises(ProvenanceError), lorafx.adapters(model, ["all", None]), EAGER():
        model(x)
    served.cm.warmup(example_inputs={"x": x})
    served.check(x, ["all", None])


def test_sums_of_adapters(served: Served) -> None:
    """ΔW of a sum is the sum of the ΔW; `merged` is W + ΔW of each."""
    x = torch.randn(2, 4, 16)
    sizes = {"ends": 0.5, "middle": 2.0}
    twin = copy.deepcopy(served.base)
    for name, weight in sizes.items():
        merged = oracle.merged(served.base, served.folders[name])
        for path, parameter in twin.named_parameters():
            parameter += weight * (merged.get_parameter(path) - served.base.get_parameter(path))
    found = served.cm(x, adapter_names=[sizes, None])
    oracle.assert_close(found, [torch.cat([twin(x[:1]), served.base(x[1:])])])


@pytest.mark.parametrize("name", ["all", "scaled"])
def test_merging(served: Served, name: str) -> None:
    x = torch.randn(3, 4, 16)
    served.cm.merge(name)
    try:
        found = served.cm(x, adapter_names=[name] * 3)
        oracle.assert_close(found, [served.alone(name)(x)])
    finally:
        served.cm.unmerge()
    for path, parameter in served.base.named_parameters():
        assert torch.equal(served.cm._orig_mod.get_parameter(path), parameter)


#: Of the second convolution: what it has, and what `merge` says of it.
ODD = {
    "groups": ({"groups": 2}, "it has 2 groups"),
    "dilation": ({"dilation": 2}, r"it has dilation \(2, 2\)"),
    "circular": ({"padding": 1, "padding_mode": "circular", "stride": (1, 2)}, "'circular'"),
}


@pytest.mark.parametrize(
    "odd", ["groups", *(pytest.param(odd, marks=pytest.mark.slow) for odd in list(ODD)[1:])]
)
def test_what_a_does_not_have(odd: str, tmp_path: Path) -> None:
    """PEFT's A has neither the base's groups, nor its dilation, nor its padding mode."""
    changes, why = ODD[odd]
    served = Served(seeded(lambda: Pyramid(**changes)), tmp_path)
    served.check(torch.randn(6, 4, 32), NAMES)
    with pytest.raises(MatchError, match=f"c2: the adapter adds no change of its weight: .*{why}"):
        served.cm.merge("middle")


@pytest.mark.slow
def test_by_inductor(tmp_path: Path) -> None:
    torch.manual_seed(0)
    conv = nn.Conv1d(4, 6, 3, stride=2, padding=1)
    model = nn.Sequential(nn.Tanh(), conv, nn.Flatten(), nn.Linear(30, 3))
    model.eval().requires_grad_(False)
    configs = {"plain": {}, "scaled": {"use_dora": True}, "biased": {"lora_bias": True}}
    paths = {
        name: oracle.save_adapter(model, tmp_path / name, rank=2, targets=["1", "3"], **config)
        for name, config in configs.items()
    }
    cm = lorafx.compile(copy.deepcopy(model), paths, dynamic=False)
    merged = {None: model, **{name: oracle.merged(model, path) for name, path in paths.items()}}
    x, names = torch.randn(4, 4, 9), ["scaled", None, "plain", "biased"]
    rows = [merged[name](row[None]) for name, row in zip(names, x, strict=True)]
    oracle.assert_close(cm(x, adapter_names=names), [torch.cat(rows)])


class Past(nn.Module):
    """A convolution whose weight is used past its module's call, or without a batch."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1, stride=2)
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        conv = self.conv
        if self.how == "function":
            return F.conv2d(x, conv.weight, conv.bias, stride=2, padding=1).flatten(1)
        if self.how == "without a batch":
            return conv(x[0])[None].flatten(1)
        if self.how == "matrix":
            return x.flatten(1)[:, :27] @ conv.weight.flatten(1).T
        return F.conv2d(x, conv.weight, conv.bias, padding=2, dilation=2).flatten(1)


def _past(how: str, folder: Path) -> tuple[Any, nn.Module, nn.Module]:
    base = seeded(lambda: Past(how)).eval().requires_grad_(False)
    path = oracle.save_adapter(base, folder, rank=2, targets=["conv"])
    cm = lorafx.compile(copy.deepcopy(base), {"a": path}, options=REFERENCE, dynamic=False)
    return cm, base, oracle.merged(base, path)


def test_a_weight_in_a_function(tmp_path: Path) -> None:
    cm, base, merged = _past("function", tmp_path)
    x = torch.randn(3, 3, 6, 6)
    found = cm(x, adapter_names=["a", None, "a"])
    oracle.assert_close(found, [torch.cat([merged(x[:1]), base(x[1:2]), merged(x[2:])])])


@pytest.mark.parametrize(
    ("how", "why"),
    [
        ("matrix", "used in a way that no rule covers"),
        ("dilated", "used past its own call .* dilation"),
    ],
)
def test_uses_that_no_rule_covers_are_refused(how: str, why: str, tmp_path: Path) -> None:
    cm, base, _ = _past(how, tmp_path)
    x = torch.randn(2, 3, 6, 6)
    with pytest.raises(MatchError, match=f"conv: its weight is {why}"):
        cm(x, adapter_names=["a", None])
    assert torch.equal(cm(x), base(x))
