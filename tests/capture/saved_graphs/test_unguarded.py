"""What a model reads, and Dynamo guards on nothing of: another process is not given its graph."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch._dynamo
from dense_merge import Case, check_mixed, save_adapter
from slowly import few
from tiny import randomise
from torch import Tensor, nn

from lorafx.errors import LorafxWarning

VOCAB = 37
VARIABLE = "SECOND_START_SCALE"
TABLE: dict[str, float] = {"other": 1.0}
SCALE = {"now": 1.0}


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.up = nn.Embedding(VOCAB, 12), nn.Linear(12, 20)
        self.down, self.head = nn.Linear(20, 12, bias=False), nn.Linear(12, VOCAB)

    def scale(self, x: Tensor) -> Any:
        return 1.0

    def forward(self, ids: Tensor) -> dict[str, Tensor]:
        x = self.embed(ids)
        middle = torch.relu(self.up(x))
        return {"logits": self.head(x + self.down(middle * self.scale(middle)))}


class OfGlobalDict(Model):
    def scale(self, x: Tensor) -> Any:
        try:
            return TABLE["scale"]
        except KeyError:
            return 1.0


class OfEnvironment(Model):
    def scale(self, x: Tensor) -> Any:
        return 3.0 if os.environ.get(VARIABLE) else 1.0


@torch._dynamo.assume_constant_result
def constant() -> float:
    return SCALE["now"]


class OfConstantResult(Model):
    def scale(self, x: Tensor) -> Any:
        return constant()


@torch.compiler.allow_in_graph
def in_graph(x: Tensor) -> Tensor:
    return torch.ones_like(x) * SCALE["now"]


class OfFunctionInGraph(Model):
    def scale(self, x: Tensor) -> Any:
        return in_graph(x)


@contextmanager
def _hook_of_all(model: Any) -> Iterator[None]:
    hook = nn.modules.module.register_module_forward_pre_hook(
        lambda module, args: (args[0] * 2,) if getattr(module, "in_features", 0) == 20 else None
    )
    try:
        yield
    finally:
        hook.remove()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder, base = tmp_path_factory.mktemp("adapters"), Model()
    return {
        f"a{n}": save_adapter(base, folder / f"a{n}", rank=n + 2, targets="all-linear", seed=n)
        for n in range(2)
    }


@pytest.mark.parametrize(
    ("cls", "change"),
    few(
        [
            (OfGlobalDict, lambda model: patch.dict(TABLE, scale=3.0)),
            (OfEnvironment, lambda model: patch.dict(os.environ, {VARIABLE: "1"})),
            *(
                (cls, lambda model: patch.dict(SCALE, now=3.0))
                for cls in (OfConstantResult, OfFunctionInGraph)
            ),
            (Model, _hook_of_all),
        ],
        OfEnvironment,
        OfConstantResult,
    ),
)
@pytest.mark.filterwarnings(f"ignore::{LorafxWarning.__module__}.{LorafxWarning.__name__}")
def test_what_no_guard_tells(
    cls: type[Model], change: Callable[[Any], Any], folders: dict[str, Path], tmp_path: Path
) -> None:
    cache = tmp_path / "graphs"
    torch.manual_seed(0)
    model = cls().eval().requires_grad_(False)
    randomise(model)
    inputs = {"ids": torch.randint(0, VOCAB, (3, 5))}

    def served() -> str:
        """What became of the graph of a model that begins now; its answer is the oracle's."""
        torch._dynamo.reset()
        case = Case(model, folders)
        cm = case.compile({"cache": str(cache)})
        check_mixed(cm, case, ["a0", None, "a1"], inputs)
        return str(cm._session.backend.records[0].saved)

    first = served()
    with change(model):
        assert served() != "loaded from the folder"
    if first == "saved for other processes":  # and nothing else keeps it from being loaded
        assert served() == "loaded from the folder"
