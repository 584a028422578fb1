"""Adapters that clients load and unload: from one folder, and never from outside it."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from served import anew, question
from served import ask as ask_once

from lorafx import CheckpointError, LoraConfig
from lorafx.adapter_store.peft_reader import read_adapter
from lorafx.integrations.server.errors import message_of
from lorafx.runtime.marking import build_sites

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
    return anew(server, files, allow_runtime_loading=True, adapter_root=root)


def ask(server, *requests):
    return [ask_once(server, "POST", path, **body) for path, body in requests]


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


@pytest.mark.parametrize("name", ["a/b:c", "tiny:a0", "a b", "é"])
def test_any_name_that_can_be_printed_is_served(files, loader, name):
    ids = files.tokenizer("w9 w12")["input_ids"]
    loaded, answer, bare, gone = ask(
        loader,
        loading(name, "inside"),
        asking(f"tiny:{name}"),
        asking(f"x:{name}"),
        unloading(name),
    )
    assert (loaded.status_code, gone.status_code) == (200, 200)
    assert answer.json()["choices"][0]["text"].strip() == files.text("a1", ids, 5)
    assert f"nearest: tiny:{name};" in bare.json()["error"]["message"]


def test_what_an_adapter_needs_is_said_in_options(files, loader, root):
    """The library's errors name fields of LoraConfig."""
    config = json.loads((root / "inside" / "adapter_config.json").read_text())
    weights = load_file(root / "inside" / "adapter_model.safetensors")
    stacked = {
        key: torch.cat([tensor] * 9, 0 if "lora_A" in key else 1).contiguous()
        for key, tensor in weights.items()
    }
    rank = config["r"] * 9
    dora = {
        key.replace("lora_B.weight", "lora_magnitude_vector"): torch.ones(len(tensor))
        for key, tensor in weights.items()
        if "lora_B" in key
    }
    cases = {
        "wide": (stacked, {"r": rank}, f"start lorafx serve with --max-rank {rank}"),
        "dora": (weights | dora, {"use_dora": True}, "with this adapter among --adapters"),
    }
    for name, (tensors, changes, way_out) in cases.items():
        folder = root / name
        folder.mkdir()
        save_file(tensors, folder / "adapter_model.safetensors")
        (folder / "adapter_config.json").write_text(json.dumps({**config, **changes}))
        (answer,) = ask(loader, loading("new", name))
        assert answer.status_code == 400
        message = answer.json()["error"]["message"]
        assert way_out in message, message
        assert "compile" not in message
        assert "LoraConfig" not in message


def test_modules_that_are_not_selected_are_said_in_options(files):
    config = LoraConfig(["k_proj"])
    _, sites = build_sites(files.case.base, config)
    with pytest.raises(CheckpointError, match="when compiling") as refused:
        read_adapter(files.adapters / "a0", "a0", sites, model=files.case.base, lora_config=config)
    message = message_of(refused.value)
    assert "add it to --target when lorafx serve starts" in message
    assert "compiling" not in message


@pytest.mark.parametrize(
    ("body", "status", "word"),
    [
        ({"lora_name": "new", "lora_path": "absent"}, 404, "no folder"),
        ({"lora_name": "new", "lora_path": "empty"}, 400, "holds no adapter weights"),
        ({"lora_name": "__base__", "lora_path": "inside"}, 400, "base"),
        ({"lora_name": "", "lora_path": "inside"}, 400, "lora_name"),
        ({"lora_name": "a\nb", "lora_path": "inside"}, 400, "cannot be printed"),
        ({"lora_name": "\ud800", "lora_path": "inside"}, 400, "cannot be printed"),
        ({"lora_name": "new"}, 400, "lora_path"),
        ({"lora_name": "new", "lora_path": "a\0b"}, 400, "lora_path"),
        ({"lora_name": "new", "lora_path": "\ud800"}, 403, "not inside"),
    ],
)
def test_bad_requests_change_nothing(loader, body, status, word):
    (answer,) = ask(loader, ("/v1/load_lora_adapter", body))
    assert answer.status_code == status
    assert word in answer.json()["error"]["message"]
    assert loader.compiled.adapters == BEFORE
