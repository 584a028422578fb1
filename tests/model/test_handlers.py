"""Classes whose calls do not map (…, K) to (…, N): a handler says what the delta means."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from attached import EAGER
from dense_merge import REFERENCE, TOLERANCE, Case, check_mixed, error
from hand_made import hand_case
from tiny import randomise
from torch import Tensor, nn

import lorafx
from lorafx.errors import MatchError
from lorafx.registry import Add

NAMES = ["a", None, "b", "a"]
K, GROUPS, COLUMNS = 6, 3, 4


def by_groups(module: Any, args: Any, kwargs: Any, output: Tensor, add: Add) -> Tensor:
    """Group g of W's rows meets group g of x: x (…, G, K) → y (…, G, n)."""
    x, size = args[0], output.shape[-1]
    groups = [add(x[..., g, :], output[..., g, :], g * size) for g in range(module.n_groups)]
    return torch.stack(groups, dim=-2)


def first_of_several(module: Any, args: Any, kwargs: Any, output: Any, add: Add) -> Any:
    """(y, ...) → (y + Δ, ...)."""
    return (add(args[0], output[0]), *output[1:])


@pytest.fixture
def registered() -> Iterator[Any]:
    added: list[type] = []

    def add(cls: type, **kwargs: Any) -> None:
        added.append(cls)
        lorafx.register(cls, **kwargs)

    yield add
    for cls in dict.fromkeys(added):
        lorafx.unregister(cls)


class GroupedLinear(nn.Linear):
    """W (G·n, K), a block of n rows for each of G groups of x."""

    def __init__(self) -> None:
        super().__init__(K, GROUPS * COLUMNS, bias=False)
        self.n_groups = GROUPS

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("...gk,gnk->...gn", x, self.weight.view(GROUPS, COLUMNS, K))


class Grouped(nn.Module):
    """A linear, a grouped linear over its output, and a linear behind."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(K, GROUPS * K)
        self.middle = GroupedLinear()
        self.last = nn.Linear(GROUPS * COLUMNS, 5)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        h = torch.tanh(self.first(x)).unflatten(-1, (GROUPS, K))
        return {"logits": self.last(self.middle(h).flatten(-2))}


class WithBias(nn.Linear):
    """Returns its bias beside the product, as serving layers that fuse the addition do."""

    def __init__(self) -> None:
        super().__init__(K, COLUMNS)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x @ self.weight.T, self.bias


class Tuples(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(K, K)
        self.middle = WithBias()

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y, bias = self.middle(torch.tanh(self.first(x)))
        return {"logits": torch.sigmoid(y) + bias}


def case_of(cls: type[nn.Module], folder: Path) -> Case:
    torch.manual_seed(0)
    base = cls()
    randomise(base)
    return hand_case(base, folder, a=["middle", "first"], b=["middle"])


def run_eagerly(model: nn.Module, name: str | None, inputs: dict[str, Tensor]) -> Tensor:
    """The logits of an attached model, all rows with one adapter."""
    with torch.no_grad(), lorafx.adapters(model, [name] * len(inputs["x"])), EAGER():
        return model(**inputs)["logits"]


HANDLED = [
    (Grouped, GroupedLinear, by_groups),
    (Tuples, WithBias, first_of_several),
]


@pytest.mark.parametrize(("model", "cls", "handler"), HANDLED)
def test_a_handler_says_where_the_delta_goes(
    tmp_path: Path, registered: Any, model: Any, cls: Any, handler: Any
) -> None:
    """Once, in graphs for mixed rows and in eager mode for one adapter."""
    registered(cls, handler=handler)
    case = case_of(model, tmp_path)
    inputs = {"x": torch.randn(4, 3, K)}
    cm = case.compile()
    check_mixed(cm, case, NAMES, inputs)
    assert not any("refused" in line for line in str(cm.explain()).splitlines())
    eager = lorafx.attach(case.model(), case.folders, options=REFERENCE)
    for name in ("a", "b", None):
        got = run_eagerly(eager, name, inputs)
        assert error(got, case.expected([name] * 4, inputs)) <= TOLERANCE


def test_without_a_handler_eager_calls_are_refused_by_name(tmp_path: Path) -> None:
    case = case_of(Grouped, tmp_path)
    eager = lorafx.attach(case.model(), case.folders, options=REFERENCE)
    with pytest.raises(MatchError, match=r"^middle \(.*register\(handler=\.\.\.\)"):
        run_eagerly(eager, "b", {"x": torch.randn(2, 3, K)})


def returns_nothing(module: Any, args: Any, kwargs: Any, output: Any, add: Add) -> None:
    add(args[0], output[0])


def adds_nothing(module: Any, args: Any, kwargs: Any, output: Any, add: Add) -> Any:
    return output


WRONG = [
    (returns_nothing, r"middle \(WithBias\): its handler returned None"),
    (adds_nothing, r"middle \(WithBias\): its handler did not call add"),
]


@pytest.mark.parametrize(("handler", "message"), WRONG)
def test_wrong_handlers_are_errors_by_name(
    tmp_path: Path, registered: Any, handler: Any, message: str
) -> None:
    registered(WithBias, handler=handler)
    case, inputs = case_of(Tuples, tmp_path), {"x": torch.randn(2, 3, K)}
    with pytest.raises(MatchError, match=message):
        case.compile()(**inputs, adapter_names=["b", None])
    eager = lorafx.attach(case.model(), case.folders, options=REFERENCE)
    with pytest.raises(MatchError, match=message):
        run_eagerly(eager, "b", inputs)
