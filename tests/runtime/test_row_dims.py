"""Which dimension of an argument holds the requests: named, declared, or assumed with a warning."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from attached import attached, compiled, fresh_dynamo, served  # noqa: F401  (the fixture)
from dense_merge import REFERENCE, Case, error
from torch import Tensor, nn

import lorafx
from lorafx.errors import BatchError, LorafxWarning

pytestmark = pytest.mark.quick

MIX = ["a", None, "b"]


class TimeFirst(nn.Module):
    """(T, B, D) in and out; nothing in it mixes rows."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(6, 9)

    def forward(self, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
        return {"logits": self.up(x if y is None else x + y)}


@pytest.fixture
def case(small) -> Case:
    return small(TimeFirst, ["up"])


def serving(case: Case, **row_dims: int) -> Any:
    config = lorafx.LoraConfig(row_dims=row_dims)
    return lorafx.compile(case.model(), config, adapters=case.folders, options=REFERENCE)


def want(case: Case, x: Tensor) -> Tensor:
    """Each request alone, requests along dimension 1."""
    rows = [case.alone(name)(x[:, b : b + 1])["logits"] for b, name in enumerate(MIX)]
    return torch.cat(rows, 1)


def test_an_assumed_dimension_that_could_be_wrong_warns_once(case):
    cm, x = serving(case), torch.randn(3, 3, 6)
    with warnings.catch_warnings():
        warnings.simplefilter("error", LorafxWarning)
        cm(x, adapter_names=["a"] * 3)  # one adapter: no dimension is wrong
        cm(torch.randn(3, 6), adapter_names=MIX)
        cm(torch.randn(3, 2, 6), adapter_names=MIX)
    with pytest.warns(LorafxWarning, match=r"'x' has shape \(3, 3, 6\).*row_dims=\{'x': 1\}"):
        cm(x, adapter_names=MIX)
    with warnings.catch_warnings():
        warnings.simplefilter("error", LorafxWarning)
        cm(x, adapter_names=MIX)


def test_a_square_matrix_of_numbers_does_not_warn_and_one_of_ids_does(small):
    class Ids(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(11, 6)

        def forward(self, tokens: Tensor) -> dict[str, Tensor]:
            return {"logits": self.table(tokens)}

    cm = small(Ids, ["table"]).compile()
    with pytest.warns(LorafxWarning, match=r"'tokens' has shape \(3, 3\)"):
        cm(torch.randint(0, 11, (3, 3)), adapter_names=MIX)


@pytest.mark.parametrize("length", [3, 5])
def test_row_dims_says_it(case, length):
    cm, x = serving(case, x=1), torch.randn(length, 3, 6)
    with warnings.catch_warnings():
        warnings.simplefilter("error", LorafxWarning)
        got = cm(x, adapter_names=MIX)["logits"]
    assert error(got, want(case, x)) <= 1e-5
    with pytest.raises(BatchError, match="adapter_names has 3 entries, but the batch has 5 rows"):
        serving(case)(torch.randn(5, 3, 6), adapter_names=MIX)


def test_a_model_that_its_user_compiles_warns_once_too(case):
    model, x = attached(case), {"x": torch.randn(3, 3, 6)}
    call = compiled(model, dynamic=False)
    served(call, model, ["a"] * 3, x)
    with pytest.warns(LorafxWarning, match=r"'x' has shape \(3, 3, 6\)"):
        served(call, model, MIX, x)
    with warnings.catch_warnings():
        warnings.simplefilter("error", LorafxWarning)
        served(call, model, MIX, x)
