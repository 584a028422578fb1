"""The folder of saved graphs: whose it is, broken files, and the one that nobody asked for."""

from __future__ import annotations

import os
import time
import warnings
from pathlib import Path

import pytest
import torch
import torch._dynamo
from dense_merge import REFERENCE, Case, check_mixed
from tiny_models import plain_inputs

import lorafx
from lorafx.capture.missed import Missed
from lorafx.capture.saved_graphs.folder import BrokenFile, files, folder_of, read, trim, write
from lorafx.capture.saved_graphs.saved_graphs import SavedGraphs
from lorafx.errors import ConfigError, LorafxWarning

pytestmark = pytest.mark.any_sizes

MIX = ("a0", None, "a1")


def served(plain: Case, folder: Path | str) -> list[str]:
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
    with pytest.raises(ConfigError, match=r"changed by others .*chmod 700"):
        lorafx.compile(model, plain.folders, options={"cache": str(shared)})
    assert hooks == {name: len(module._forward_hooks) for name, module in model.named_modules()}
    shared.chmod(0o700)
    assert folder_of(str(shared)) == shared
    monkeypatch.setattr(os, "getuid", lambda: shared.stat().st_uid + 1)
    with pytest.raises(ConfigError, match="the folder has to be your own"):
        folder_of(str(shared))
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="no folder can be made"):
        folder_of(str(tmp_path / "file"))


def test_a_torch_that_cannot_keep_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lorafx.torch_internals.versions.saves_graphs", lambda: False)
    with pytest.raises(ConfigError, match=r"needs torch 2\.13 or later"):
        lorafx.Options(cache=True)
    assert lorafx.Options(cache=None).cache is None


def test_the_files_of_others_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tmp_path.chmod(0o700)
    path = write(tmp_path, "key", b"body")
    assert read(path, "key") == b"body"
    assert files(tmp_path, "key") == [path]
    monkeypatch.setattr(os, "getuid", lambda: path.stat().st_uid + 1)
    with pytest.raises(BrokenFile, match="belongs to user"):
        read(path, "key")


def test_a_link_and_a_file_that_others_may_change_are_not_read(tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    path = write(tmp_path, "key", b"body")
    link = path.with_name("link.graph")
    link.symlink_to(path)
    with pytest.raises(BrokenFile):
        read(link, "key")
    path.chmod(0o620)
    with pytest.raises(BrokenFile, match="changed by others"):
        read(path, "key")
    path.chmod(0o600)
    assert read(path, "key") == b"body"
    path.parent.chmod(0o770)
    assert files(tmp_path, "key") == []
    with pytest.raises(PermissionError, match="changed by others"):
        write(tmp_path, "key", b"other")


def test_files_that_were_not_used_for_longest_go_first(tmp_path: Path) -> None:
    paths = [write(tmp_path, f"key{number}", bytes(100)) for number in range(4)]
    for number, path in enumerate(paths):
        os.utime(path, (1000.0 + number, 1000.0 + number))
    read(paths[0], "key0")
    size = paths[0].stat().st_size
    left, fresh = paths[0].with_name("left.tmp"), paths[0].with_name("fresh.tmp")
    for path in (left, fresh):
        path.write_bytes(b"half")
    os.utime(left, (time.time() - 7200,) * 2)
    trim(tmp_path, 4 * size)
    assert all(path.exists() for path in (*paths, fresh))
    assert not left.exists()
    trim(tmp_path, 2 * size)
    assert [path.exists() for path in paths] == [True, False, False, True]
    assert not paths[1].parent.exists()


@pytest.fixture
def auto(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of `cache="auto"`, which is on; a warning is an error."""
    monkeypatch.setenv("LORAFX_CACHE_DIR", str(tmp_path / "lorafx"))
    monkeypatch.delenv("LORAFX_CACHE_BYTES")
    return tmp_path / "lorafx" / "graphs"


def served_quietly(plain: Case) -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("error", LorafxWarning)
        (text,) = served(plain, "auto")
    return text


def test_graphs_are_kept_by_default(
    plain: Case, auto: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert lorafx.Options().cache == "auto"
    assert served_quietly(plain) == "saved for other processes"
    assert auto.stat().st_mode & 0o777 == auto.parent.stat().st_mode & 0o777 == 0o700
    assert served_quietly(plain) == "loaded from the folder"
    (path,) = auto.glob("*/*.graph")
    path.chmod(0o666)
    assert served_quietly(plain) == "saved for other processes"
    monkeypatch.setenv("LORAFX_CACHE_BYTES", "1000")
    for path in auto.glob("*/*.graph"):
        path.unlink()
    assert served_quietly(plain) == "saved for other processes"
    assert not list(auto.glob("*/*"))  # since it takes more than 1000 bytes
    monkeypatch.setenv("LORAFX_CACHE_BYTES", "0")
    assert served_quietly(plain) == "not saved: LORAFX_CACHE_BYTES is 0"
    monkeypatch.setenv("LORAFX_CACHE_BYTES", "a lot")
    assert "must be a number of bytes" in served_quietly(plain)


@pytest.mark.one_road
def test_eager_calls_look_for_no_graphs_where_there_is_no_folder(
    plain: Case, in_eager_mode: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks: list[int] = []
    monkeypatch.setattr(SavedGraphs, "found", lambda *_: looks.append(1) or Missed())
    cm = plain.compile(REFERENCE)  # LORAFX_CACHE_BYTES is 0
    torch.manual_seed(0)
    check_mixed(cm, plain, MIX, plain_inputs(3, 5))
    assert not looks


@pytest.mark.slow
def test_a_folder_that_nobody_asked_for_fails_and_warns_of_nothing(plain: Case, auto: Path) -> None:
    auto.parent.write_text("a file")
    assert "no folder can be made" in served_quietly(plain)
    auto.parent.unlink()
    auto.mkdir(parents=True)
    auto.chmod(0o777)
    assert "can be changed by others" in served_quietly(plain)
    auto.chmod(0o700)
    auto.parent.chmod(0o770)
    assert f"{auto.parent}, above {auto}, can be changed by others" in served_quietly(plain)
    auto.parent.chmod(0o1777)  # as /tmp, where nobody renames what is another's
    assert served_quietly(plain) == "saved for other processes"
    elsewhere = auto.with_name("elsewhere")
    auto.rename(elsewhere)
    auto.symlink_to(elsewhere)
    assert "is not a folder" in served_quietly(plain)
    cm = plain.compile(options={**REFERENCE, "cache": "auto"}, dynamic=False)
    check_mixed(cm, plain, MIX, plain_inputs(3, 5))
    assert "is not a folder" in str(cm.explain())
