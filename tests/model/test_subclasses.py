"""Subclasses of registered classes, with forwards of their own or without."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from attached import EAGER
from dense_merge import REFERENCE, TOLERANCE, Case, check_mixed, error
from hand_made import SCALE, factors, hand_case, save
from tiny import randomise
from torch import Tensor, nn

import lorafx
from lorafx import layers
from lorafx.errors import MatchError
from lorafx.registry import lookup

pytestmark = pytest.mark.usefixtures("fixed_sizes")

K, N = 6, 8
NAMES = ["a", None, "b", "a"]


@pytest.fixture
def registered() -> Iterator[Any]:
    added: list[type] = []

    def add(cls: type, **kwargs: Any) -> None:
        added.append(cls)
        lorafx.register(cls, **kwargs)

    yield add
    for cls in dict.fromkeys(added):
        lorafx.unregister(cls)


# Forwards of their own, all of which add ΔW x once


class Deep(nn.Linear):
    pass


class Deeper(Deep):
    pass


class Deepest(Deeper):
    def __init__(self) -> None:
        super().__init__(K, N)


class Offset(Deeper):
    """An offset beside the bias."""

    def __init__(self) -> None:
        super().__init__(K, N)
        self.offset = nn.Parameter(torch.randn(N))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.offset


class OtherKernel(Deep):
    def __init__(self) -> None:
        super().__init__(K, N)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, K)
        return torch.addmm(self.bias, flat, self.weight.t()).view(*x.shape[:-1], N)


class WithBias(Deep):
    """Serving layers return the bias for others to add."""

    def __init__(self) -> None:
        super().__init__(K, N)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return F.linear(x, self.weight), self.bias


class Output(NamedTuple):
    y: Tensor
    norm: Tensor


class WithNorm(Deep):
    def __init__(self) -> None:
        super().__init__(K, N)

    def forward(self, x: Tensor) -> Output:
        return Output(super().forward(x), x.norm(dim=-1, keepdim=True))


class Gate(layers.ReplicatedLinear):
    """As a router's gate: computes in float32, and returns two things as serving layers do."""

    def __init__(self) -> None:
        super().__init__(K, N, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return super().forward(x.float()).to(x.dtype), None


class Model(nn.Module):
    """A linear, the class in question, and a linear behind."""

    def __init__(self, middle: type[nn.Module]) -> None:
        super().__init__()
        self.first = nn.Linear(K, K)
        self.middle = middle()
        self.last = nn.Linear(N, 5)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = self.middle(torch.tanh(self.first(x)))
        if isinstance(y, tuple):
            y = sum(item for item in y if item is not None)
        return {"logits": self.last(torch.relu(y))}


def case_of(cls: type[nn.Module], folder: Path) -> Case:
    torch.manual_seed(0)
    base = Model(cls)
    randomise(base)
    return hand_case(base, folder, a=["middle", "first"], b=["middle"])


def eager(case: Case, name: str | None, x: Tensor) -> Tensor:
    model = lorafx.attach(case.model(), case.folders, options=REFERENCE)
    with torch.no_grad(), lorafx.adapters(model, [name] * len(x)), EAGER():
        model(x)  # the first call checks, the second does not
        return model(x)["logits"]


ADDING = [Deepest, Offset, OtherKernel, WithBias, WithNorm, Gate]


@pytest.mark.parametrize("cls", ADDING)
def test_a_subclass_is_eligible_and_keeps_its_forward(tmp_path: Path, cls: Any) -> None:
    """Mixed rows in a graph, one adapter a batch in eager mode: the delta once in each."""
    case = case_of(cls, tmp_path)
    x = torch.randn(4, 3, K)
    check_mixed(case.compile(options={"verify": "numeric"}), case, NAMES, {"x": x})
    for name in ("b", None):
        assert error(eager(case, name, x), case.expected([name] * 4, {"x": x})) <= TOLERANCE


# Forwards that the delta cannot be added to


class Router(Deep):
    """Its second output is computed from x Wᵀ too."""

    def __init__(self) -> None:
        super().__init__(K, N)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = super().forward(x)
        return y, torch.softmax(y, dim=-1)


def test_other_arithmetic_is_refused_in_eager_mode_and_right_in_graphs(tmp_path: Path) -> None:
    case = case_of(Router, tmp_path)
    x = torch.randn(4, 3, K)
    check_mixed(case.compile(), case, NAMES, {"x": x})
    with pytest.raises(MatchError, match=r"^middle \(Router\): its class overrides forward"):
        eager(case, "b", x)


# Kernels over weights that are no plain numbers


class Int8(Deep):
    """W = s · Q, int8 matrix and one scale a row, multiplied by a kernel of its own."""

    def __init__(self) -> None:
        super().__init__(K, N)
        weight = torch.randn(N, K)
        self.scale = nn.Parameter(weight.abs().amax(1) / 127, requires_grad=False)
        quantised = (weight / self.scale[:, None]).round().to(torch.int8)
        self.weight = nn.Parameter(quantised, requires_grad=False)
        self.compute_dtype = torch.float32

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype)) * self.scale + self.bias


class Packed(Deep):
    """The matrix is an attribute of an object that the module holds."""

    def __init__(self) -> None:
        super().__init__(K, N)
        self.held = [self.weight.detach().clone()]
        del self.weight

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.held[0], self.bias)


class WithDelta(nn.Module):
    """The oracle of a weight that cannot be merged into: module(x) + x ΔWᵀ."""

    def __init__(self, module: nn.Module, delta: Tensor) -> None:
        super().__init__()
        self.module, self.delta = module, delta

    def forward(self, x: Tensor) -> Tensor:
        return self.module(x) + F.linear(x, self.delta)


@pytest.mark.parametrize("cls", [Int8, Packed])
def test_another_kernel_over_a_stored_weight(tmp_path: Path, cls: Any) -> None:
    torch.manual_seed(0)
    base = Model(cls).eval().requires_grad_(False)
    plain = nn.ModuleDict({"middle": nn.Linear(K, N)})
    case = Case(base, {})
    for rank, name in ((2, "a"), (3, "b")):
        pairs = factors(plain, ["middle"], rank=rank, seed=rank)
        a, b = pairs["middle"]
        case.folders[name] = save(plain, tmp_path / name, pairs)
        case.merged[name] = case.model()
        case.merged[name].middle = WithDelta(case.merged[name].middle, SCALE * (b @ a))
    x = torch.randn(4, 3, K)
    check_mixed(case.compile(), case, NAMES, {"x": x})
    assert error(eager(case, "b", x), case.expected(["b"] * 4, {"x": x})) <= TOLERANCE


# Which entry is found


def test_the_nearest_class_along_the_mro_wins(registered: Any) -> None:
    registered(Deep, weight="deep")
    registered(Deeper, weight="deeper")
    assert lookup(Deepest()).weight == "deeper"
    assert lookup(WithBias()).weight == "deep"
    lorafx.unregister(Deeper)
    assert lookup(Deepest()).weight == "deep"
    registered(Deeper, weight="again")
    assert lookup(Offset()).weight == "again"


def test_unregistering_a_nearer_class_restores_what_its_instances_were(
    tmp_path: Path, registered: Any
) -> None:
    """An entry with the wrong sizes refuses; without it the base's entry serves again."""
    registered(OtherKernel, in_features="out_features", out_features="in_features")
    case = case_of(OtherKernel, tmp_path)
    with pytest.raises(lorafx.TargetError, match=r"middle \(OtherKernel\): its weight has shape"):
        case.compile()
    lorafx.unregister(OtherKernel)
    check_mixed(case.compile(), case, NAMES, {"x": torch.randn(4, 3, K)})
    registered(OtherKernel)
