"""Which errors another torch is said to be the cause of."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from dense_merge import REFERENCE
from torch import Tensor, nn

import lorafx
from lorafx.errors import LorafxError, UnsupportedVersionError
from lorafx.torch_internals import compat

pytestmark = pytest.mark.quick
CONFIG = lorafx.LoraConfig(max_rank=2, target_modules="all-linear")


def compiled(model: nn.Module) -> Any:
    return lorafx.compile(model.eval(), CONFIG, options=REFERENCE, dynamic=False)


class _Gone:
    """In the place of a module of torch's that lacks what is asked for."""


def test_of_private_ground(monkeypatch: pytest.MonkeyPatch) -> None:
    from lorafx.torch_internals import dynamo

    monkeypatch.setattr(dynamo, "OptimizedModule", None)
    monkeypatch.setattr("lorafx.passes.select.OptimizedModule", None)
    with pytest.raises(UnsupportedVersionError, match=r"pip install .*torch==") as got:
        lorafx.attach(nn.Sequential(nn.Linear(4, 4)).eval(), CONFIG)
    assert f"torch {torch.__version__.partition('+')[0]}" in str(got.value)
    assert isinstance(got.value.__cause__, TypeError)


def test_of_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    cm = compiled(nn.Sequential(nn.Linear(4, 4)))
    monkeypatch.setattr(compat, "_C", _Gone())
    with pytest.raises(UnsupportedVersionError, match="_functorch"):
        cm(torch.randn(2, 4))
    with pytest.raises(UnsupportedVersionError, match="_functorch"):
        cm.load_adapter({}, "a")


class Own(nn.Module):
    """Raises an error of its own, in Python."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return self.up(x) + self.nothing


@pytest.mark.parametrize(
    ("model", "given", "error"),
    [
        (Own(), torch.randn(2, 4), AttributeError),
        (nn.Sequential(nn.Linear(4, 4)), "text", TypeError),
    ],
)
def test_not_of_the_model(model: nn.Module, given: Any, error: type[Exception]) -> None:
    cm = compiled(model)
    with pytest.raises(Exception) as got:  # noqa: PT011 - as torch raises it
        cm(given)
    assert not isinstance(got.value, UnsupportedVersionError)
    assert isinstance(got.value, (error, LorafxError, torch._dynamo.exc.TorchDynamoException))
