"""Whatever differs from the model whose graph was saved, the graph is compiled anew, and is right.

The model stands in a file of its own, so that its code can be edited too.
"""

from __future__ import annotations

import importlib
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo
from dense_merge import REFERENCE, Case, build_case, check_mixed
from slowly import few
from tiny_models import VOCAB, Family
from torch import Tensor, nn

import lorafx

SOURCE = """
import torch
from torch import nn

SCALE = 1.5


def mixed(a, b):
    return a * SCALE + b


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.up = nn.Linear(width, 20)
        self.down = nn.Linear(20, width, bias=False)
        self.norm = nn.LayerNorm(width)
        self.act_fn = nn.ReLU()
        self.gain = 0.5

    def forward(self, x):
        x = self.norm(x)
        return mixed(self.down(self.act_fn(self.up(x))), x) * self.gain


class Model(nn.Module):
    def __init__(self, vocabulary):
        super().__init__()
        self.embed = nn.Embedding(vocabulary, 12)
        self.blocks = nn.ModuleList([Block(12), Block(12)])
        self.head = nn.Linear(12, vocabulary)

    def forward(self, ids):
        x = self.embed(ids)
        for block in self.blocks:
            x = x + block(x)
        return {"logits": self.head(x) * torch.full((1,), 2.0)}
"""
NAME = "lorafx_second_start_model"
MIX = ("a0", None, "a1")


def inputs() -> dict[str, Tensor]:
    torch.manual_seed(1)
    return {"ids": torch.randint(0, VOCAB, (3, 5))}


class Start:
    """A folder of graphs, and the module that holds the model's code."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / f"{NAME}.py"
        self.file.write_text(SOURCE)
        self.module: Any = importlib.import_module(NAME)
        self.cache = folder / "graphs"
        self.cache.mkdir(mode=0o700)
        targets = ("all-linear", ["up"], ["down", "head"], ["up"], ["down"])
        family = Family(lambda: self.module.Model(VOCAB), targets, lambda rows, length: inputs())
        self.case = build_case(family, folder)

    def call(self, changed: nn.Module, config: Any = None, **options: Any) -> list[str]:
        """Compile the model and call it; its answer is the oracle's. What became of its graph."""
        torch._dynamo.reset()
        case = Case(changed, self.case.folders)
        given: Any = {"options": {**REFERENCE, "cache": str(self.cache), **options}}
        given["dynamic"] = False  # captures are faster
        if config is None:
            cm = lorafx.compile(case.model(), case.folders, **given)
        else:
            cm = lorafx.compile(case.model(), config, adapters=case.folders, **given)
        check_mixed(cm, case, MIX, inputs())
        return [record.saved for record in cm._session.backend.records]


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Start]:
    folder = tmp_path_factory.mktemp("models")
    sys.path.insert(0, str(folder))
    before = sys.dont_write_bytecode
    sys.dont_write_bytecode = True
    try:
        found = Start(folder)
        assert found.call(found.case.model()) == ["saved for other processes"]
        yield found
        # Nothing but the changes kept the graph of the model as it was from being loaded.
        assert found.call(found.case.model()) == ["loaded from the folder"]
    finally:
        sys.path.remove(str(folder))
        sys.dont_write_bytecode = before
        sys.modules.pop(NAME, None)


def _tied(model: Any) -> None:
    model.blocks[1].norm.weight = model.blocks[0].norm.weight


def _own_forward(model: Any) -> None:
    block = model.blocks[1]
    block.forward = types.MethodType(lambda self, x: self.down(self.up(x)), block)


CHANGES: Mapping[str, Callable[[Any], Any]] = {
    "another activation": lambda model: setattr(model.blocks[1], "act_fn", nn.GELU()),
    "another scaling": lambda model: setattr(model.blocks[1], "gain", 2.0),
    "a hook on one layer": lambda model: model.blocks[1].register_forward_hook(
        lambda module, args, output: output * 2
    ),
    "tied weights": _tied,
    "a forward of one instance": _own_forward,
}


@pytest.mark.parametrize(
    "name", few(CHANGES, "another scaling", "a forward of one instance", "tied weights")
)
def test_a_changed_model(begun: Start, name: str) -> None:
    model = begun.case.model()
    CHANGES[name](model)
    assert "loaded from the folder" not in begun.call(model)


@pytest.mark.parametrize("change", ["global", "method"])
def test_changed_code(begun: Start, monkeypatch: pytest.MonkeyPatch, change: str) -> None:
    block, forward = begun.module.Block, begun.module.Block.forward
    owner, name, value = {
        "global": (begun.module, "SCALE", 3.0),
        "method": (block, "forward", lambda self, x: forward(self, x) * 2),
    }[change]
    monkeypatch.setattr(owner, name, value)
    assert begun.call(begun.case.model()) == ["saved for other processes"]


def test_an_edited_file_that_is_not_loaded_yet(begun: Start) -> None:
    begun.file.write_text(SOURCE + "\n# another line\n")
    try:
        assert begun.call(begun.case.model()) == ["saved for other processes"]
    finally:
        begun.file.write_text(SOURCE)


def test_another_default_dtype(begun: Start) -> None:
    """The `torch.full` of the model's forward would be float64."""
    torch.set_default_dtype(torch.float64)
    try:
        assert begun.call(begun.case.model()) == ["saved for other processes"]
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize(
    "config", [{"max_adapters": 9}, {"target_modules": ["up", "down", "head", "embed"]}]
)
def test_other_modules_or_room_for_adapters(begun: Start, config: Any) -> None:
    config = lorafx.LoraConfig(**{"target_modules": "all-linear", **config})
    assert begun.call(begun.case.model(), config) == ["saved for other processes"]


def test_a_pass_that_is_switched_off(begun: Start) -> None:
    assert begun.call(begun.case.model(), passes={"fuse": False, "pack": False}) == [
        "saved for other processes"
    ]
