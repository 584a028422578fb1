"""Subclasses of registered classes, with forwards of their own or without."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from attached import EAGER
from dense_merge import REFERENCE, TOLERANCE, Case, check_mixed, error
from hand_made import hand_case
from tiny import randomise
from torch import Tensor, nn

import lorafx
from lorafx.errors import MatchError

pytestmark = pytest.mark.usefixtures("fixed_sizes")

K, N = 6, 8
NAMES = ["a", None, "b", "a"]


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


@pytest.mark.parametrize("cls", [Deepest, Offset, WithBias, WithNorm])
def test_a_subclass_is_eligible_and_keeps_its_forward(tmp_path: Path, cls: Any) -> None:
    """Mixed rows in a graph, one adapter a batch in eager mode, where the output is the product."""
    case = case_of(cls, tmp_path)
    x = torch.randn(4, 3, K)
    check_mixed(case.compile(), case, NAMES, {"x": x})
    assert error(eager(case, None, x), case.expected([None] * 4, {"x": x})) <= TOLERANCE
    if cls is Deepest:
        assert error(eager(case, "b", x), case.expected(["b"] * 4, {"x": x})) <= TOLERANCE
    else:
        with pytest.raises(MatchError, match=r"its class overrides forward.*use lorafx\.compile"):
            eager(case, "b", x)
