"""Subclasses of registered classes, with forwards of their own or without."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any, NamedTuple

import peft
import pytest
import torch
import torch.nn.functional as F
from attached import EAGER
from dense_merge import REFERENCE, TOLERANCE, Case, check_mixed, error
from hand_made import hand_case
from tiny import randomise
from torch import Tensor, nn

import lorafx
from lorafx.errors import LorafxWarning, MatchError

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


class Doubled(Deep):
    def __init__(self) -> None:
        super().__init__(K, N)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(F.linear(x * 2, self.weight, self.bias))


class Normed(Deep):
    def __init__(self) -> None:
        super().__init__(K, N)
        self.norm = nn.LayerNorm(K)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.norm(x), self.weight, self.bias)


class Shifted(nn.Embedding):
    def __init__(self) -> None:
        super().__init__(9, N)

    def forward(self, ids: Tensor) -> Tensor:
        return F.embedding(ids + 2, self.weight)


class Positions(Shifted):
    """Looks up something else than its first argument."""

    def forward(self, mask: Tensor, places: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(places)


class Lookup(nn.Module):
    def __init__(self, middle: type[nn.Module]) -> None:
        super().__init__()
        self.middle, self.last = middle(), nn.Linear(N, 5)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        inputs = (torch.ones_like(x), x) if isinstance(self.middle, Positions) else (x,)
        return {"logits": self.last(self.middle(*inputs))}


def changing_case(cls: type[nn.Module], folder: Path) -> tuple[Case, Tensor]:
    if not issubclass(cls, nn.Embedding):
        return case_of(cls, folder), torch.randn(4, 3, K)
    torch.manual_seed(0)
    base = Lookup(cls)
    return hand_case(base, folder, a=["middle"], b=["middle"]), torch.randint(0, 7, (4, 3))


def by_peft(case: Case, names: list[str | None], x: Tensor) -> Tensor:
    """Each row alone, by PEFT's own unmerged layers."""
    rows = []
    for row, name in zip(x, names, strict=True):
        model = case.model()
        if name is not None:
            model = peft.PeftModel.from_pretrained(model, str(case.folders[name])).eval()
        with torch.no_grad():
            rows.append(model(x=row[None])["logits"])
    return torch.cat(rows)


@pytest.mark.parametrize("start", ["eager", "compiled"])
@pytest.mark.parametrize("cls", [Doubled, Normed, Shifted])
def test_a_module_that_changes_its_input_gets_the_delta_of_its_argument(
    tmp_path: Path, cls: Any, start: str
) -> None:
    case, x = changing_case(cls, tmp_path)
    options = {"start": start, "cache": None}
    cm = case.compile(options)
    with pytest.warns(LorafxWarning, match=r"^middle \(.*changes its input") as warned:
        got = [cm(x=x, adapter_names=names)["logits"] for names in (NAMES, ["b"] * 4)]
    assert len(warned) == 1
    for names, logits in zip((NAMES, ["b"] * 4), got, strict=True):
        want = by_peft(case, names, x)
        assert error(logits, want) <= TOLERANCE
        assert error(want, case.expected(names, {"x": x})) > 100 * TOLERANCE
    with pytest.raises(MatchError, match="middle: its forward changes its input"):
        cm.merge("a")
    with pytest.raises(MatchError, match="middle: its forward changes its input"):
        cm.export_merged("a", tmp_path / "merged")


@pytest.mark.parametrize("start", ["eager", "compiled"])
@pytest.mark.parametrize("cls", [Doubled, Normed, Shifted])
def test_the_weight_s_delta_if_an_option_says_so(tmp_path: Path, cls: Any, start: str) -> None:
    case, x = changing_case(cls, tmp_path)
    cm = case.compile({"start": start, "cache": None, "delta_of": "weight"})
    check_mixed(cm, case, NAMES, {"x": x})
    cm.merge("a")
    assert error(cm(x=x)["logits"], case.expected(["a"] * 4, {"x": x})) <= TOLERANCE


def test_a_merge_before_any_call_asks_the_module(tmp_path: Path) -> None:
    for cls in (Doubled, Shifted):
        case, _ = changing_case(cls, tmp_path / cls.__name__)
        with pytest.raises(MatchError, match="middle: its class overrides forward, and no graph"):
            case.compile().merge("a")


class Plain(Deep):
    def __init__(self) -> None:
        super().__init__(K, N)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.reshape(-1, K), self.weight, self.bias).view(*x.shape[:-1], N)


class SequenceFirst(Deep):
    """A product of a view that is not contiguous, which torch expands first."""

    def __init__(self) -> None:
        super().__init__(K, N)

    def forward(self, x: Tensor) -> Tensor:
        x = x.transpose(0, 1).contiguous().transpose(0, 1)
        return torch.relu(F.linear(x, self.weight, self.bias))


class ByColumns(Deep):
    def __init__(self) -> None:
        super().__init__(K, N)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.weight @ x.transpose(1, 2)).transpose(1, 2)


@pytest.mark.parametrize("cls", [Plain, Positions, SequenceFirst, ByColumns])
def test_views_and_other_operands_change_no_input(tmp_path: Path, cls: Any) -> None:
    case, x = changing_case(cls, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", LorafxWarning)
        check_mixed(case.compile(), case, NAMES, {"x": x})


class Twice(Deep):
    def __init__(self) -> None:
        super().__init__(K, K)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(torch.tanh(F.linear(x, self.weight)), self.weight, self.bias)


class Square(nn.Module):
    def __init__(self, middle: type[nn.Module]) -> None:
        super().__init__()
        self.middle, self.last = middle(), nn.Linear(K, 5)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"logits": self.last(self.middle(x))}


@pytest.mark.parametrize("start", ["eager", "compiled"])
def test_a_second_product_in_one_call_is_refused(tmp_path: Path, start: str) -> None:
    torch.manual_seed(0)
    case = hand_case(Square(Twice), tmp_path, a=["middle"], b=["last"])
    cm = case.compile({"start": start, "cache": None})
    x = torch.randn(3, 2, K)
    for names in (["a", None, "a"], ["a"] * 3):
        with pytest.raises(MatchError, match="at middle: its forward multiplies by its weight mor"):
            cm(x=x, adapter_names=names)
    check_mixed(cm, case, ["b", None, "b"], {"x": x})


class Clamped(Deep):
    """Its output is the product until a value leaves the range."""

    def __init__(self) -> None:
        super().__init__(K, N)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).clamp(-1.5, 1.5)


def test_eager_mode_takes_no_output_for_a_product_by_its_numbers(tmp_path: Path) -> None:
    case = case_of(Clamped, tmp_path)
    cm = case.compile({"start": "eager", "cache": None})
    for gain in (1e-3, 5.0):
        x = {"x": gain * torch.randn(4, 3, K)}
        got, want = cm(**x, adapter_names=NAMES)["logits"], case.expected(NAMES, x)
        assert error(got, want) <= TOLERANCE


class Abstract(nn.Module):
    """Its subclasses say how they multiply."""

    in_features, out_features = K, N

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(N, K))


class Product(Abstract):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


class Scaled(Abstract):
    def forward(self, x: Tensor) -> Tensor:
        return 3 * F.linear(x, self.weight)


@pytest.mark.parametrize("start", ["eager", "compiled"])
def test_a_registered_class_without_a_forward(tmp_path: Path, start: str) -> None:
    """What its subclasses make of the product is looked at, as they have the weight."""
    lorafx.register(Abstract)
    try:
        base = nn.Sequential(nn.Linear(K, K), Product(), nn.Linear(N, K), Scaled())
        randomise(base.eval().requires_grad_(False))
        case = hand_case(base, tmp_path, a=["1", "3"], b=["3"])
        x, cm = torch.randn(4, 3, K), case.compile({"start": start})
        assert error(cm(x, adapter_names=NAMES), case.expected(NAMES, {"input": x})) <= TOLERANCE
    finally:
        lorafx.unregister(Abstract)
