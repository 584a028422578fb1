"""Adapters that clients load and unload: from one folder, and never from outside it."""

from __future__ import annotations

import asyncio
import shutil

import pytest
from served import client_of, question

from lorafx.server.app import build_app
from lorafx.server.served_model import ServedModel

PATH = "/v1/completions"
BEFORE = tuple(f"a{i}" for i in range(5))


@pytest.fixture(scope="module")
def root(files, tmp_path_factory):
    """The allowed folder: it holds one adapter, and links that lead out of it."""
    root = tmp_path_factory.mktemp("allowed")
    shutil.copytree(files.adapters / "a1", root / "inside")
    (root / "linked").symlink_to(files.adapters / "a2", target_is_directory=True)
    shutil.copytree(files.adapters / "a2", root / "weights_linked")
    weights = root / "weights_linked" / "adapter_model.safetensors"
    weights.unlink()
    weights.symlink_to(files.adapters / "a2" / "adapter_model.safetensors")
    (root / "loop").symlink_to(root / "loop")
    (root / "empty").mkdir()
    return root


@pytest.fixture(scope="module")
def loader(files, server, root):
    """The same model in an application that lets clients load."""
    served = ServedModel(server.compiled, files.tokenizer, "tiny")
    return server._replace(app=build_app(served, server.engine, root))


def ask(server, *requests):
    async def all_of_them():
        async with client_of(server) as client:
            return [await client.post(path, json=body) for path, body in requests]

    return asyncio.run(all_of_them())


def loading(name, path, **others):
    return "/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(path), **others}


def unloading(name):
    return "/v1/unload_lora_adapter", {"lora_name": name}


def asking(name):
    return PATH, {"model": name, **question(PATH, "w9 w12", 5)}


def test_load_answer_replace_unload(files, loader, root):
    ids = files.tokenizer("w9 w12")["input_ids"]
    got = ask(
        loader,
        asking("tiny:new"),
        loading("new", "inside"),
        asking("tiny:new"),
        loading("new", "inside"),
        loading("new", root / "inside", load_inplace=True),
        unloading("nwe"),
        unloading("new"),
        asking("tiny:new"),
    )
    assert [answer.status_code for answer in got] == [404, 200, 200, 400, 200, 404, 200, 404]
    assert got[2].json()["choices"][0]["text"].strip() == files.text("a1", ids, 5)
    assert "nearest: new" in got[5].json()["error"]["message"]
    assert loader.compiled.adapters == BEFORE


def test_nothing_outside_the_folder_is_read(files, loader, root, monkeypatch):
    def read(*_, **__):
        raise AssertionError("read")

    monkeypatch.setattr(type(loader.compiled), "load_adapter", read)
    monkeypatch.chdir(files.adapters)  # relative paths are the allowed folder's
    outside = [
        files.adapters / "a1",
        "../" * 20 + str(files.adapters / "a1")[1:],
        f"inside/../../{root.name}/../{files.adapters.parent.name}/adapters/a1",
        "linked",
        "weights_linked",
        "loop",
        "x" * 5000,
        "/etc",
        "/nowhere/at/all",  # as /etc: the answer does not say what there is
    ]
    for path, answer in zip(
        outside, ask(loader, *(loading("new", p) for p in outside)), strict=True
    ):
        assert answer.status_code == 403, path
        assert "not inside" in answer.json()["error"]["message"]
    assert loader.compiled.adapters == BEFORE


@pytest.mark.parametrize(
    ("body", "status", "word"),
    [
        ({"lora_name": "new", "lora_path": "absent"}, 404, "no folder"),
        ({"lora_name": "new", "lora_path": "empty"}, 400, "adapter_config.json"),
        ({"lora_name": "__base__", "lora_path": "inside"}, 400, "base"),
        ({"lora_name": "", "lora_path": "inside"}, 400, "lora_name"),
        ({"lora_name": "new"}, 400, "lora_path"),
        ({"lora_name": "new", "lora_path": "a\0b"}, 400, "lora_path"),
    ],
)
def test_bad_requests_change_nothing(loader, body, status, word):
    (answer,) = ask(loader, ("/v1/load_lora_adapter", body))
    assert answer.status_code == status
    assert word in answer.json()["error"]["message"]
    assert loader.compiled.adapters == BEFORE
