"""What is refused, with which words, and that nothing has changed afterwards."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from dense_merge import save_adapter
from safetensors.torch import load_file, save_file
from tiny_models import FAMILIES

import lorafx
from lorafx.errors import (
    BatchError,
    CapacityError,
    CheckpointError,
    ConfigError,
    LorafxError,
    TargetError,
    UnknownAdapterError,
    UnsupportedAdapterError,
)

pytestmark = pytest.mark.quick

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


class Served:
    """A compiled model with room for two adapters, and a good call to compare with afterwards."""

    def __init__(self, case: Any) -> None:
        torch.manual_seed(0)
        self.inputs = FAMILIES["plain"].inputs(3, 4)
        config = lorafx.LoraConfig(max_adapters=2, max_rank=8)
        self.cm = lorafx.compile(
            case.model(), config, adapters=case.folders, options={"lowering": "reference"}
        )
        self.good = self.call(["a1", None, "a3"])
        self.state = self.snapshot()

    def call(self, names: Any) -> torch.Tensor:
        return self.cm(**self.inputs, adapter_names=names)["logits"]

    def snapshot(self) -> tuple[Any, ...]:
        return self.cm.adapters, self.cm.recompiles, self.cm.memory()

    def unchanged(self) -> None:
        assert self.snapshot() == self.state
        assert torch.equal(self.call(["a1", None, "a3"]), self.good)


@pytest.fixture(scope="module")
def shared(plain):
    return Served(plain)


@pytest.fixture
def served(shared):
    yield shared
    shared.unchanged()


@pytest.fixture
def folder(plain, tmp_path) -> Path:
    """A copy of a good adapter, to be spoiled."""
    return Path(shutil.copytree(plain.folders["a1"], tmp_path / "spoiled"))


# Calls
@pytest.mark.parametrize(
    ("names", "error", "message"),
    [
        (
            ["a1", "a7", None],
            UnknownAdapterError,
            r"no adapter named 'a7'; nearest: a4.*; loaded: a0",
        ),
        (
            ["a1", None],
            BatchError,
            "adapter_names has 2 entries, but the batch has 3 rows; give one",
        ),
        (["a1"] * 6, BatchError, "adapter_names has 6 entries, but the batch has 3 rows"),
        (
            "a1",
            ConfigError,
            "adapter_names must be a list with one name, or None, per row; got 'a1'",
        ),
        ([], LorafxError, "adapter_names is empty"),
        (
            ["a0", "a1", "a2"],
            CapacityError,
            "3 distinct adapters .a0, a1, a2.*but there are only 2 slots",
        ),
    ],
    ids=["unknown", "too-few", "too-many", "string", "empty", "too-many-adapters"],
)
def test_adapter_names(served, names, error, message):
    with pytest.raises(error, match=message):
        served.call(names)


@pytest.mark.parametrize("names", [{"a1": 1}, 3, [1, None, "a0"], [["a0"], None, "a1"]])
def test_adapter_names_of_the_wrong_type(served, names):
    with pytest.raises(
        ConfigError, match=r"adapter_names(\[\d\] is .*; give a name| must be a list)"
    ):
        served.call(names)


def test_the_default_adapter(served):
    with pytest.raises(UnknownAdapterError, match="no adapter named 'a11'; nearest: a1"):
        served.cm.set_adapter("a11")
    with pytest.raises(UnknownAdapterError, match="no adapter named 'gone'"):
        served.cm.unload_adapter("gone")
    with pytest.raises(UnknownAdapterError, match="no adapter named 'gone'"):
        served.cm.pin_adapter("gone")


def test_blocks_without_the_default_that_overlap(served):
    """As those of two threads do, or of two tasks of asyncio that await inside."""
    cm = served.cm
    cm.set_adapter("a1")
    first, second = cm.disable_adapter(), cm.disable_adapter()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert cm.active_adapter is None
    second.__exit__(None, None, None)
    assert cm.active_adapter == "a1"
    with cm.disable_adapter():
        cm.set_adapter("a2")
        with cm.disable_adapter():
            assert cm.active_adapter is None
        assert cm.active_adapter == "a2"
    assert cm.active_adapter == "a1"
    cm.set_adapter(None)


# Checkpoints
def shorten(folder: Path) -> None:
    state = load_file(folder / WEIGHTS)
    save_file({k: v[:, :-1].contiguous() for k, v in state.items()}, folder / WEIGHTS)


def rename(folder: Path) -> None:
    state = load_file(folder / WEIGHTS)
    save_file({k.replace("down.", "dwon."): v for k, v in state.items()}, folder / WEIGHTS)


def cut(folder: Path) -> None:
    file = folder / WEIGHTS
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def ask(folder: Path, **fields: Any) -> None:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, **fields}))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (shorten, CheckpointError, r"up.*\(5, 11\)"),
        (rename, CheckpointError, "dwon"),
        (cut, CheckpointError, WEIGHTS),
        (lambda folder: (folder / WEIGHTS).unlink(), CheckpointError, WEIGHTS),
        (lambda folder: (folder / CONFIG).unlink(), CheckpointError, CONFIG),
        (shutil.rmtree, CheckpointError, "spoiled"),
        (lambda folder: ask(folder, arrow_config={}), UnsupportedAdapterError, "arrow_config"),
    ],
)
def test_spoiled_files(served, folder, change, error, message):
    """The adapter of that name stays."""
    change(folder)
    for name in ("new", "a1"):
        with pytest.raises(error, match=message):
            served.cm.load_adapter(folder, name)


def test_rank_over_max_rank(served, plain, tmp_path):
    wide = save_adapter(plain.base, tmp_path / "wide", rank=9, targets=["up"])
    with pytest.raises(CapacityError, match=r"rank 9.*LoraConfig\(max_rank=9\)"):
        served.cm.load_adapter(wide, "new")


def test_no_source(served):
    """As of an unset variable: the adapter of that name stays."""
    for name in ("a0", "new"):
        with pytest.raises(CheckpointError, match="not from a NoneType"):
            served.cm.load_adapter(None, name)
    assert "a0" in served.cm.adapters


@pytest.mark.parametrize("name", ["__base__", "", 3])
def test_names_that_no_adapter_can_have(served, plain, name):
    with pytest.raises(ConfigError, match="an adapter's name is a non-empty string"):
        served.cm.load_adapter(plain.folders["a0"], name)


# Compiling
def untouched(model: Any, before: dict[str, int]) -> None:
    assert not any(module._forward_hooks for module in model.modules())
    assert {name: p.data_ptr() for name, p in model.named_parameters()} == before


@pytest.mark.parametrize(
    ("config", "kwargs", "error", "message"),
    [
        ({"target_modules": ["upp"]}, {}, TargetError, r"upp.*nearest: up"),
        ({"target_modules": r".*nothing"}, {}, TargetError, r"\.\*nothing"),
        ({"target_modules": ["act"]}, {}, TargetError, r"act.*ReLU"),
        ({"max_rank": 0}, {}, ConfigError, "max_rank must be a positive integer, got 0"),
        ({"max_adapters": True}, {}, ConfigError, "max_adapters must be a positive integer"),
        ({}, {"options": {"lowerng": "reference"}}, ConfigError, "'lowerng'; nearest: lowering"),
        ({}, {"options": {"lowering": "cuda"}}, ConfigError, "lowering must be one of auto"),
        ({}, {"options": {"passes": {"fusee": False}}}, ConfigError, "'fusee'; nearest: fuse"),
        ({}, {"options": {"passes": {"match": False}}}, ConfigError, "'match' cannot be switched"),
        ({}, {"adapters": {"x": "/nowhere/at/all"}}, CheckpointError, "/nowhere/at/all"),
    ],
)
def test_configurations(config, kwargs, error, message):
    torch.manual_seed(0)
    model = FAMILIES["plain"].build()
    model.act = torch.nn.ReLU()
    before = {name: p.data_ptr() for name, p in model.named_parameters()}
    with pytest.raises(error, match=message):
        lorafx.compile(model, lorafx.LoraConfig(**config), **kwargs)
    untouched(model, before)


def test_a_bad_adapter_among_good_ones_leaves_the_model_alone(plain, folder):
    shorten(folder)
    model = plain.model()
    before = {name: p.data_ptr() for name, p in model.named_parameters()}
    with pytest.raises(CheckpointError, match="up"):
        lorafx.compile(model, {**plain.folders, "bad": folder})
    for given, message in (({}, "empty mapping"), (3, "is a folder, a dict or a peft.LoraConfig")):
        with pytest.raises(LorafxError, match=message):
            lorafx.compile(model, given)
    untouched(model, before)


def test_errors_about_values_are_value_errors():
    for cls in (BatchError, CapacityError, CheckpointError, ConfigError, UnknownAdapterError):
        assert issubclass(cls, ValueError)
        assert issubclass(cls, LorafxError)
