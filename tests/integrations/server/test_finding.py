"""Adapters that are loaded when they are first asked for."""

from __future__ import annotations

import asyncio
import shutil
import threading

import pytest
from served import ask, client_of, plain, question, serving
from waiting import LONG, until

from lorafx.adapter_store.checkpoint import config_of

PATH = "/v1/completions"


def asking(model, new=5):
    return {"model": model, **question(PATH, "w9 w12", new)}


@pytest.fixture(scope="module")
def root(files, tmp_path_factory):
    root = tmp_path_factory.mktemp("found")
    for name in ("a1", "a2", "a3"):
        shutil.copytree(files.adapters / name, root / name)
    shutil.copytree(files.adapters / "a2", root / "broken")
    (root / "broken" / "adapter_model.safetensors").write_bytes(b"nothing")
    (root / "linked").symlink_to(files.adapters / "a2", target_is_directory=True)
    (root / "inner").mkdir()
    shutil.copytree(files.adapters / "a2", root / "inner" / "deep")
    return root


@pytest.fixture
def finder(files, root):
    configs = map(config_of, (files.adapters / f"a{i}" for i in range(5)))
    target = tuple({name for config in configs for name in config.target_modules or ()})
    given = {"adapters": None, "resolve_adapters": True, "adapter_root": root, "target": target}
    with serving(files, **given, max_rank=8, max_adapter_reads=1) as server:
        yield server


def test_found_on_the_first_request(files, finder):
    ids = files.tokenizer("w9 w12")["input_ids"]
    assert finder.compiled.adapters == ()
    for name in ("tiny:a1", "tiny:a1", "tiny:a2"):
        answer = ask(finder, "POST", PATH, **asking(name))
        assert answer.status_code == 200, answer.text
        assert plain(PATH, answer.json()).strip() == files.text(name[5:], ids, 5)
    assert finder.compiled.adapters == ("a1", "a2")
    listed = ask(finder, "GET", "/v1/models").json()["data"]
    assert {"tiny", "tiny:a1", "tiny:a2"} <= {entry["id"] for entry in listed}

    for name in ("zzz", "inner/deep", "../adapters/a1", ".", "", "inner", "a\0b", "x" * 5000):
        answer = ask(finder, "POST", PATH, **asking(f"tiny:{name}"))
        assert answer.status_code == 404, name
    answer = ask(finder, "POST", PATH, **asking("tiny:broken"))
    assert answer.status_code == 400
    assert "'broken' has a folder and is not served" in answer.json()["error"]["message"]
    assert ask(finder, "POST", PATH, **asking("tiny:linked")).status_code == 400
    assert finder.compiled.adapters == ("a1", "a2")
    named = ask(finder, "POST", PATH, **asking("tiny"), adapter_id="a3")
    assert plain(PATH, named.json()).strip() == files.text("a3", ids, 5)


def test_others_are_answered_while_one_is_read(finder, root, monkeypatch):
    """One adapter is read at a time, and once for all who wait for it."""
    load, go, reading, most = finder.compiled.load_adapter, threading.Event(), [], []

    def slowly(folder, name):
        reading.append(name)
        most.append(len(reading) - sum(n in finder.compiled.adapters for n in set(reading)))
        assert go.wait(LONG)
        load(folder, name)

    monkeypatch.setattr(type(finder.compiled), "load_adapter", lambda _, *given: slowly(*given))

    async def talk():
        async with client_of(finder) as client:
            names = ("tiny:a3", "tiny:a3", "tiny:a1")
            asked = [asyncio.create_task(client.post(PATH, json=asking(n))) for n in names]
            await until(lambda: reading)
            asked[1].cancel()  # a client that goes away ends no reading
            base = await client.post(PATH, json=asking("tiny"))
            assert reading == ["a3"]
            go.set()
            return base, [await asked[0], await asked[2]]

    base, answers = asyncio.run(talk())
    assert [answer.status_code for answer in (base, *answers)] == [200] * 3
    assert reading == ["a3", "a1"]
    assert most == [1, 1]
