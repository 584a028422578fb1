"""Where adapters come from: folders of several libraries, single files, the hub, bytes, memory."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from dense_merge import random_base, save_adapter
from dialect_files import WEIGHTS, as_mlx
from safetensors.torch import load_file, save_file
from torch import nn

import lorafx
from lorafx.adapter_store import saved
from lorafx.adapter_store.checkpoint import load_state
from lorafx.errors import CheckpointError, UnsupportedAdapterError

pytestmark = [
    pytest.mark.quick,
    pytest.mark.filterwarnings("ignore"),
]
CONFIG = "adapter_config.json"


@pytest.fixture(scope="module")
def base() -> nn.Module:
    return random_base("llama")


@pytest.fixture(scope="module")
def folder(base: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_adapter(base, tmp_path_factory.mktemp("peft"), rank=2, targets=["q_proj"])


def same(source: object, base: nn.Module, folder: Path) -> bool:
    """Whether `source` is the adapter in `folder`."""
    got, want = load_state(source, base), load_state(folder, base)
    return got.config == want.config and all(
        torch.equal(got.tensors[key], tensor) for key, tensor in want.tensors.items()
    )


def test_one_file_whose_metadata_holds_the_configuration(base, folder, tmp_path) -> None:
    file = tmp_path / "sql.safetensors"
    save_file(load_file(folder / WEIGHTS), file, {"adapter_config": (folder / CONFIG).read_text()})
    assert same(file, base, folder)
    assert same(tmp_path, base, folder)  # the one file in it
    assert same(file.read_bytes(), base, folder)
    save_file(load_file(folder / WEIGHTS), file, {"adapter_config": "[1"})
    with pytest.raises(CheckpointError, match=r"adapter_config in the metadata of .* as JSON"):
        load_state(file, base)
    config = {**json.loads((folder / CONFIG).read_text()), "arrow_config": {}}
    save_file(load_file(folder / WEIGHTS), file, {"adapter_config": json.dumps(config)})
    with pytest.raises(UnsupportedAdapterError, match="arrow_config"):
        load_state(file, base)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A cache in the hub's layout: blobs, links to them by name, references."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))

    def keep(name: str, folder: Path, revision: str = "main") -> None:
        home = tmp_path / f"models--{name.replace('/', '--')}"
        commit = f"{abs(hash(revision)):040x}"[:40]
        (home / "refs").mkdir(parents=True, exist_ok=True)
        (home / "refs" / revision).write_text(commit)
        (home / "blobs").mkdir(exist_ok=True)
        snapshot = home / "snapshots" / commit
        snapshot.mkdir(parents=True)
        for file in folder.iterdir():
            blob = home / "blobs" / f"{commit}{file.name}"
            shutil.copy(file, blob)
            (snapshot / file.name).symlink_to(os.path.relpath(blob, snapshot))

    return keep


def test_a_name_on_the_hub(base, folder, hub, tmp_path) -> None:
    hub("someone/sql-adapter", folder)
    assert same("someone/sql-adapter", base, folder)
    hub("someone/mlx", as_mlx(folder, tmp_path / "mlx"), "v2")
    state = load_state(lorafx.AdapterSource("someone/mlx", revision="v2"), base)
    assert state.dialect == "mlx"


def test_a_name_that_the_hub_does_not_have(base, hub) -> None:
    with pytest.raises(CheckpointError, match=r"does not exist here, and .* from the hub"):
        load_state("someone/absent", base)
    with pytest.raises(CheckpointError, match="adapter folder someone/absent does not exist"):
        load_state(Path("someone/absent"), base)  # a path stays on this machine


@pytest.mark.parametrize("single", [False, True])
def test_files_that_are_written_while_they_are_read(
    base, folder, tmp_path, single, monkeypatch
) -> None:
    """α of the old version would scale the factors of the new one."""
    own = Path(shutil.copytree(folder, tmp_path / "own"))
    new = save_adapter(base, tmp_path / "new", rank=2, targets=["q_proj"], seed=5, lora_alpha=40)
    read = saved._parse_if_peft

    def written_meanwhile(*found: Any) -> object:
        for name in (CONFIG, WEIGHTS):
            os.replace(new / name, own / name)
        return read(*found)

    source = own / WEIGHTS if single else own
    with monkeypatch.context() as patch:
        patch.setattr(saved, "_parse_if_peft", written_meanwhile)
        with pytest.raises(CheckpointError, match="was written while the adapter was read"):
            load_state(source, base)
    assert load_state(source, base).config.lora_alpha == 40
