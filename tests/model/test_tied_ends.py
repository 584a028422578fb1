"""A head and an embedding of one weight: whose use is whose, and what only looks like W."""

from __future__ import annotations

from pathlib import Path

import oracle
import pytest
import torch
import torch.nn.functional as F
from dense_merge import REFERENCE
from torch import Tensor, nn

import lorafx
from lorafx.errors import MatchError

pytestmark = pytest.mark.usefixtures("fixed_sizes")

V, D = 24, 20


class Scaled(nn.Module):
    """Looks rows of ±W up: arithmetic that no rule knows, of a class that nobody registered."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(V, D))

    def forward(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.weight.abs() * self.weight.sign())


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = Scaled()
        self.inner = nn.Linear(D, D)
        self.head = nn.Linear(D, V, bias=False)
        self.head.weight = self.words.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.inner(self.look_up(ids)))

    def look_up(self, ids: Tensor) -> Tensor:
        return self.words(ids)


class Broken(Tied):
    """Breaks behind the lookup and before the head, as around a loop over experts."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(V, D)
        self.head.weight = self.words.weight

    def look_up(self, ids: Tensor) -> Tensor:
        rows = self.words(ids).flatten(0, 1)
        torch._dynamo.graph_break()
        return rows

    def forward(self, ids: Tensor) -> Tensor:
        x = self.inner(self.look_up(ids))
        torch._dynamo.graph_break()
        return self.head(x).unflatten(0, ids.shape)


class Copied(Broken):
    """The weight itself, copied in one graph and multiplied by in the next one."""

    def forward(self, ids: Tensor) -> Tensor:
        weight = self.head.weight.clone()
        x = self.inner(self.look_up(ids))
        return x @ weight.T


def served(model: nn.Module, folder: Path) -> tuple[oracle.Oracle, lorafx.CompiledModel]:
    model = model.eval().requires_grad_(False)
    folders = {
        name: oracle.save_adapter(model, folder / name, rank=2, targets=["inner", "head"], seed=i)
        for i, name in enumerate("ab")
    }
    return oracle.Oracle.of(model, folders), lorafx.compile(model, folders, options=REFERENCE)


def test_an_embedding_of_any_class_is_no_use_of_the_head(tmp_path: Path) -> None:
    cases, cm = served(Tied(), tmp_path)
    inputs, names = {"ids": torch.randint(0, V, (3, 5))}, ["a", None, "b"]
    oracle.assert_close(cm(**inputs, adapter_names=names), cases.rows(names, inputs))


def test_rows_of_the_weight_behind_a_break_are_no_copy_of_it(tmp_path: Path) -> None:
    cases, cm = served(Broken(), tmp_path)
    for ids in (torch.arange(15).reshape(3, 5), torch.randint(0, V, (3, 5))):
        (want,) = cases.rows(["a"] * 3, {"ids": ids})
        oracle.assert_close(cm(ids, adapter_names=["a"] * 3), [want])
        assert oracle.difference(cases.rows([None] * 3, {"ids": ids}), [want]) > 1e-2
        torch._dynamo.reset()


def test_a_copy_of_the_weight_behind_a_break_is_one(tmp_path: Path) -> None:
    _, cm = served(Copied(), tmp_path)
    with pytest.raises(MatchError, match=r"head: .*the weight itself is returned"):
        cm(torch.arange(15).reshape(3, 5), adapter_names=["a"] * 3)
