"""The folder of saved graphs: whose it is, broken files."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
import torch._dynamo
from dense_merge import REFERENCE, Case, check_mixed
from tiny_models import plain_inputs

import lorafx
from lorafx.capture.saved_graphs.folder import BrokenFile, files, folder_of, read, write
from lorafx.errors import ConfigError, LorafxWarning

MIX = ("a0", None, "a1")


def served(plain: Case, folder: Path) -> list[str]:
    """What became of the graphs of a model that begins now; its answer is the oracle's."""
    torch._dynamo.reset()
    cm = plain.compile(options={**REFERENCE, "cache": str(folder)}, dynamic=False)
    torch.manual_seed(0)
    check_mixed(cm, plain, MIX, plain_inputs(3, 5))
    return [record.saved for record in cm._session.backend.records]


def test_broken_files_are_told_and_replaced(plain: Case, tmp_path: Path) -> None:
    home = tmp_path / "graphs"
    assert served(plain, home) == ["saved for other processes"]
    assert home.stat().st_mode & 0o777 == 0o700
    (path,) = home.glob("*/*.graph")
    whole = path.read_bytes()
    middle = len(whole) // 2
    for broken in (
        whole[:middle],
        whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :],
    ):
        path.write_bytes(broken)
        with pytest.warns(LorafxWarning, match="cannot be loaded, so its graph is compiled anew"):
            assert served(plain, home) == ["saved for other processes"]
        (path,) = home.glob("*/*.graph")
    assert served(plain, home) == ["loaded from the folder"]


def test_a_folder_that_cannot_be_written_to_fails_no_call(plain: Case, tmp_path: Path) -> None:
    home = tmp_path / "graphs"
    torch._dynamo.reset()
    cm = plain.compile(options={**REFERENCE, "cache": str(home)}, dynamic=False)
    home.rmdir()
    home.write_text("a file")
    torch.manual_seed(0)
    with pytest.warns(LorafxWarning, match="are not saved"):
        check_mixed(cm, plain, MIX, plain_inputs(3, 5))


def test_whose_folder_it_is(plain: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o777)
    model = plain.model()
    hooks = {name: len(module._forward_hooks) for name, module in model.named_modules()}
    with pytest.raises(ConfigError, match=r"others may write .*chmod 700"):
        lorafx.compile(model, plain.folders, options={"cache": str(shared)})
    assert hooks == {name: len(module._forward_hooks) for name, module in model.named_modules()}
    shared.chmod(0o700)
    assert folder_of(str(shared)) == shared
    monkeypatch.setattr(os, "getuid", lambda: shared.stat().st_uid + 1)
    with pytest.raises(ConfigError, match="the folder has to be your own"):
        folder_of(str(shared))
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be a folder"):
        folder_of(str(tmp_path / "file"))


def test_a_torch_that_cannot_keep_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lorafx.torch_internals.saved_graphs.can_be_noted", lambda: False)
    with pytest.raises(ConfigError, match=r"needs torch 2\.13 or later"):
        lorafx.Options(cache=True)
    assert lorafx.Options(cache=None).cache is None


def test_the_files_of_others_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tmp_path.chmod(0o700)
    path = write(tmp_path, "key", b"body")
    assert read(path, "key") == b"body"
    assert files(tmp_path, "key") == [path]
    monkeypatch.setattr(os, "getuid", lambda: path.stat().st_uid + 1)
    with pytest.raises(BrokenFile, match="another user"):
        read(path, "key")
