"""A trainer beside the server writes its adapter into a file in shared memory and names that: it is
read once, whatever becomes of the file, and a file that does not fit changes nothing."""

from __future__ import annotations

import asyncio
import os
import pickle
import tempfile
import threading
from pathlib import Path

import httpx2
import pytest
import torch
import uvicorn
from safetensors.torch import load_file, save, save_file
from served import anew, ask, client_of, free_port, gated, question, wait_for
from waiting import LONG, until

from lorafx.adapter_store import saved
from lorafx.adapter_store.untrusted_files import read_file, unsound

LOAD, PATH, FILE = "/v1/load_lora_adapter", "/v1/completions", "policy.safetensors"


@pytest.fixture
def shared():
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        yield Path(folder)


@pytest.fixture
def loader(server, files, shared):
    allowed = {"allow_runtime_loading": True, "adapter_root": shared}
    yield anew(server, files, max_upload_bytes=1 << 20, **allowed)
    if "policy" in server.compiled.adapters:
        server.compiled.unload_adapter("policy")


def parts(files, adapter="a1"):
    folder = files.adapters / adapter
    metadata = {"adapter_config": (folder / "adapter_config.json").read_text()}
    return load_file(folder / "adapter_model.safetensors"), metadata


def asking(new=8):
    return {"model": "policy", **question(PATH, "w9 w12", new, ignore_eos=True)}


def loading(path=FILE):
    return {"lora_name": "policy", "lora_path": str(path), "load_inplace": True}


def held(folder):
    """The open files and mappings of this process in a folder."""
    open_files = [os.readlink(f) for f in Path("/proc/self/fd").iterdir() if f.is_symlink()]
    lines = [*open_files, *Path("/proc/self/maps").read_text().splitlines()]
    return [line for line in lines if str(folder) in line]


def test_each_version_over_http(files, loader, shared):
    """After the answer the trainer writes over its file, cuts it short and removes it."""
    port = free_port()
    http = uvicorn.Server(uvicorn.Config(loader.app, port=port, log_level="error"))
    thread = threading.Thread(target=http.run)
    thread.start()
    try:
        with httpx2.Client(base_url=f"http://127.0.0.1:{port}", timeout=LONG) as client:
            wait_for(client)
            for version in ("a1", "a2", "a1"):
                tensors, metadata = parts(files, version)
                save_file(tensors, shared / FILE, metadata)
                answer = client.post(LOAD, json=loading())
                assert answer.status_code == 200, answer.text
                with (shared / FILE).open("r+b") as file:
                    file.write(bytes(500))
                    file.truncate(500)
                (shared / FILE).unlink()
                said = client.post(PATH, json=asking()).json()
                ids = files.tokenizer("w9 w12")["input_ids"]
                want = files.text(version, ids, 8).split()[:4]
                assert said["choices"][0]["text"].split()[:4] == want
                assert said["adapter_version"] == int(answer.headers["x-adapter-version"])
                assert loader.compiled._session.store["policy"].origin is None
                assert not held(shared)
    finally:
        http.should_exit = True
        thread.join()


def test_a_request_under_way_ends_with_its_version(files, loader, shared):
    async def talk():
        save_file(parts(files, "a1")[0], shared / FILE, parts(files, "a1")[1])
        async with client_of(loader) as client:
            await client.post(LOAD, json=loading())
            with gated(loader, free=3) as gate:
                running = asyncio.create_task(client.post(PATH, json=asking(12), timeout=LONG))
                await until(lambda: gate.steps > gate.free)
                save_file(parts(files, "a2")[0], shared / FILE, parts(files, "a2")[1])
                assert (await client.post(LOAD, json=loading())).status_code == 200
                gate.open.set()
                return (await running).json(), (await client.post(PATH, json=asking(12))).json()

    ids = files.tokenizer("w9 w12")["input_ids"]
    for answer, name in zip(asyncio.run(talk()), ("a1", "a2"), strict=True):
        said = answer["choices"][0]["text"].split()
        assert said[:4] == files.text(name, ids, 12).split()[:4]


def cut(tensors):
    return {k: v[:, :3].contiguous() if "lora_A" in k else v for k, v in tensors.items()}


def spoilt(tensors):
    return {k: v.index_fill(0, torch.tensor(0), torch.nan) for k, v in tensors.items()}


@pytest.mark.parametrize(
    ("content", "status", "word"),
    [
        (lambda tensors, metadata: save(tensors, metadata)[:-8], 400, "truncated"),
        (lambda *_: (1 << 30).to_bytes(8, "little") + b"{", 400, "header"),
        (lambda *_: b"", 400, "safetensors"),
        (lambda tensors, _: pickle.dumps(tensors), 400, "safetensors"),
        (lambda tensors, _: save(tensors), 400, "config"),
        (lambda tensors, metadata: save(cut(tensors), metadata), 400, "shape"),
        (lambda tensors, metadata: save(spoilt(tensors), metadata), 400, "NaN"),
        (lambda *_: bytes((1 << 20) + 1), 413, "--max-upload-bytes"),
    ],
)
def test_files_that_are_refused(files, loader, shared, content, status, word):
    before = dict(loader.compiled.adapter_versions)
    (shared / FILE).write_bytes(content(*parts(files)))
    answer = ask(loader, "POST", LOAD, **loading())
    assert (answer.status_code, word in answer.text) == (status, True), answer.text
    assert loader.compiled.adapter_versions == before
    assert not held(shared)


def test_paths_that_are_refused(files, loader, shared, tmp_path):
    tensors, metadata = parts(files)
    save_file(tensors, tmp_path / FILE, metadata)
    (shared / "linked.safetensors").symlink_to(tmp_path / FILE)
    os.mkfifo(shared / "pipe.safetensors")
    (shared / "policy.bin").write_bytes(save(tensors, metadata))
    (shared / "beside").mkdir()
    save_file(tensors, shared / "beside" / FILE, metadata)
    (shared / "beside" / "adapter_config.json").symlink_to(tmp_path / "absent")
    for path, status in {
        **dict.fromkeys([tmp_path / FILE, f"../{FILE}", "linked.safetensors"], 403),
        **{f"beside/{FILE}": 403, "pipe.safetensors": 404, "policy.bin": 404, FILE: 404},
    }.items():
        answer = ask(loader, "POST", LOAD, **loading(path))
        assert (answer.status_code, answer.json()["error"]["param"]) == (status, "lora_path"), path
    assert "policy" not in loader.compiled.adapters


def test_a_file_that_is_written_over_while_it_is_read(files, loader, shared, monkeypatch):
    """Mapped files that were cut short ended the process with SIGBUS."""
    save_file(parts(files)[0], shared / FILE, parts(files)[1])

    def read_slowly(file):
        found = read_file(file)
        assert not held(shared)
        os.truncate(file, 500)
        return found

    monkeypatch.setattr(saved, "read_file", read_slowly)
    answer = ask(loader, "POST", LOAD, **loading())
    assert (answer.status_code, "was written while" in answer.text) == (400, True), answer.text
    assert "policy" not in loader.compiled.adapters


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_numbers_that_are_not_finite_are_counted(dtype):
    assert not unsound(torch.ones(2, 0, dtype=dtype))
    assert not unsound(torch.full((3,), torch.finfo(dtype).max, dtype=dtype))
    odd = torch.tensor([[1, torch.nan, -torch.inf], [torch.inf, 0, torch.nan]], dtype=dtype)
    assert unsound(odd) == unsound(odd.mT) == 4
