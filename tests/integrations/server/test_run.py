"""The command: what it refuses before it loads, and how a server ends."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx2
import pytest
import torch
from served import SMALL, ask, free_port, plain, question, said, serving, wait_for
from waiting import LONG

from lorafx import LorafxError, LorafxWarning
from lorafx.errors import ConfigError, respelled
from lorafx.integrations.cli import main
from lorafx.integrations.cli.options import as_option
from lorafx.integrations.server import check_requirements
from lorafx.integrations.server.run import run
from lorafx.integrations.server.settings import Settings
from lorafx.torch_internals.versions import saves_graphs

pytestmark = pytest.mark.any_sizes

OPTIONS = [
    *(part for name, value in SMALL.items() for part in (f"--{name.replace('_', '-')}", str(value)))
]


def test_a_signal_lets_streams_end(files, monkeypatch, capfd):
    """The whole command, with HTTP: SIGTERM comes in the middle of an answer, which stands still in
    a paused engine. The server samples, and requests choose how hot; the key comes from the
    environment."""
    path = "/v1/completions"
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    arguments = ["serve", str(files.model), "--adapters", str(files.adapters), "--port", str(port)]
    arguments += ["--temperature", "1", "--max-host-bytes", "1000000", "--allow-control"]
    monkeypatch.setattr("sys.argv", ["lorafx", *arguments, *OPTIONS])
    monkeypatch.setenv("LORAFX_API_KEY", "s3cret")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    key = {"Authorization": "Bearer s3cret"}
    process = os.getpid()
    came = threading.Barrier(2)

    def stream() -> str:
        wait_for(httpx2.Client(base_url=url))
        hot = {"model": "tiny:a1", **question(path, "w9 w12", 20, temperature=3)}
        assert httpx2.post(url + path, json=hot).status_code == 401

        def texts(body: dict) -> set[str]:
            answers = [
                httpx2.post(url + path, json=body, timeout=LONG, headers=key).json()
                for _ in range(3)
            ]
            return {answer["choices"][0]["text"] for answer in answers}

        assert len(texts(hot)) > 1
        assert len(texts({**hot, "seed": 1})) == 1
        body = {"model": "tiny:a1", **question(path, "w9 w12", 40, stream=True, temperature=0)}
        with httpx2.stream("POST", url + path, json=body, timeout=LONG, headers=key) as answer:
            chunks = answer.iter_text()
            first = next(chunks)
            came.wait(LONG)
            return first + "".join(chunks)

    def knock() -> str:
        came.wait(LONG)
        httpx2.post(f"{url}/pause?mode=keep", headers=key).raise_for_status()
        os.kill(process, signal.SIGTERM)
        for _ in range(1000):  # those that still come are answered; then nobody listens
            try:
                httpx2.get(f"{url}/health").raise_for_status()
            except httpx2.TransportError:
                return "gone"
        return "there"

    before = signal.getsignal(signal.SIGTERM)
    with ThreadPoolExecutor(2) as clients:
        streamed, gone = clients.submit(stream), clients.submit(knock)
        with pytest.raises(SystemExit) as ended:
            main()
        assert not ended.value.code
        text = streamed.result(LONG)
        assert gone.result(LONG) == "gone"
    ids = files.tokenizer("w9 w12")["input_ids"]
    assert said(path, text).strip() == files.text("a1", ids, 40)
    assert signal.getsignal(signal.SIGTERM) is before
    shown = capfd.readouterr()
    assert re.search(f"serving 'tiny' and 5 adapters on {url}/v1, ready after [0-9.]+ s", shown.out)
    phases = (
        *("importing torch and the server", "loading tiny", "adding 5 adapters"),
        "compiling the engine's steps, ahead of requests",
    )
    for phase in phases:
        assert re.search(f"lorafx: {phase}: [0-9.]+ s", shown.err), phase


@pytest.mark.slow
@pytest.mark.skipif(not saves_graphs(), reason="this torch cannot save graphs")
def test_requests_are_answered_while_graphs_are_compiled(compiled_beside, files, monkeypatch):
    monkeypatch.setenv("LORAFX_START", "eager")
    path, given = "/v1/completions", {"cache": None, "graphs": True}
    with serving(files, **given) as server:
        ids = files.tokenizer("w9 w12")["input_ids"]
        for adapter, name in (("a1", "tiny:a1"), (None, "tiny")):
            body = {"model": name, **question(path, "w9 w12", 8, temperature=0)}
            answer = ask(server, "POST", path, **body)
            assert plain(path, answer.json()).strip() == files.text(adapter, ids, 8)
        health = ask(server, "GET", "/health").json()
        assert health == {"status": "ok", "graphs": "compiling: 0 of 2 graphs"}
        metrics = ask(server, "GET", "/metrics").text
        assert re.search('^lorafx_graphs{tier="compiling"} [12].0$', metrics, re.MULTILINE)
        assert server.compiled.recompiles == 0
    with serving(files, **given, warmup=True) as server:
        assert server.compiled.recompiles > 0
        assert ask(server, "GET", "/health").json() == {"status": "ok"}


@pytest.mark.quick
@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"model": "{tmp}/absent"}, "config.json"),
        ({"model": "{tmp}"}, "config.json"),
        ({"model": "a/b/c"}, "config.json"),
        ({"adapters": "{tmp}/absent"}, "not a folder"),
        ({"adapters": "{tmp}/none"}, "no adapter to serve"),
        ({"adapters": "{tmp}/broken"}, "adapter_config.json"),
        ({"adapters": "{tmp}/weightless"}, "holds no adapter weights"),
        ({"max_rank": 1}, "--max-rank 1"),
        ({"max_host_bytes": 0}, "--max-host-bytes"),
        ({"max_adapters": 0}, "--max-adapters"),
        ({"slot_rank": 32}, "--slot-rank = 32 is over max_rank"),
        ({"port": 70000}, "--port"),
        ({"api_key": ""}, "--api-key"),
        ({"api_key": "two words"}, "LORAFX_API_KEY"),
        ({"temperature": -1.0}, "--temperature"),
        ({"max_memory_percent": 3.0}, "--max-memory-percent"),
        ({"lowering": "refrence"}, "lowering"),
        ({"adapter_root": "{tmp}"}, "--allow-runtime-loading"),
        ({"adapters": None, "allow_runtime_loading": True}, "--adapter-root"),
        ({"adapter_root": "{tmp}/absent", "allow_runtime_loading": True}, "not a folder"),
    ],
)
def test_bad_settings_are_refused_before_anything_is_loaded(files, tmp_path, change, word):
    (tmp_path / "none").mkdir()
    (tmp_path / "broken" / "a").mkdir(parents=True)
    (tmp_path / "broken" / "a" / "adapter_config.json").write_text("{")
    shutil.copytree(files.adapters / "a0", tmp_path / "weightless")
    (tmp_path / "weightless" / "adapter_model.safetensors").unlink()
    given: dict = {"model": str(files.model), "adapters": files.adapters}
    for name, value in change.items():
        text = value.format(tmp=tmp_path) if isinstance(value, str) else value
        given[name] = Path(text) if name in ("adapters", "adapter_root") and text else text
    with pytest.raises(LorafxError) as refused:
        Settings(**given)
    assert word in respelled(refused.value, as_option)


@pytest.mark.quick
def test_a_folder_may_be_one_adapter_or_hold_other_things(files, tmp_path):
    assert list(Settings(model=str(files.model), adapters=files.adapters / "a3").found) == ["a3"]
    weights = shutil.copytree(files.adapters / "a3", tmp_path / "a3") / "adapter_model.safetensors"
    weights.rename(weights.with_name("own_name.safetensors"))
    (tmp_path / "notes").mkdir()
    with pytest.warns(LorafxWarning, match="notes"):
        assert list(Settings(model=str(files.model), adapters=tmp_path).found) == ["a3"]


@pytest.mark.quick
def test_the_command_names_its_own_options(files, monkeypatch):
    asked = ["lorafx", "serve", str(files.model), "--adapters", str(files.adapters)]
    monkeypatch.setattr("sys.argv", [*asked, "--lowering", "refrence"])
    with pytest.raises(SystemExit, match=r"^lorafx: --lowering must be one of auto, "):
        main()


@pytest.mark.quick
def test_the_room_that_adapters_get(files):
    given = {"max_adapters": 5, "slot_rank": 2, "max_host_bytes": 10_000}
    config = Settings(model=str(files.model), adapters=files.adapters, **given).lora_config()
    assert config.max_rank == 8  # the largest of the adapters
    assert {name: getattr(config, name) for name in given} == given


@pytest.mark.quick
def test_a_port_that_is_taken(files):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        settings = Settings(model=str(files.model), adapters=files.adapters, port=port)
        with pytest.raises(ConfigError, match=f"port {port}"):
            settings.bind()


@pytest.mark.quick
def test_several_processes_of_torchrun_are_refused(files, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="lorafx serve is one process"):
        run(Settings(model=str(files.model), adapters=files.adapters, port=0))


def test_without_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(ConfigError, match=r"uvicorn.*pip install '\.\[serve\]'"):
        check_requirements()


@pytest.mark.quick
def test_with_an_older_transformers(monkeypatch):
    """Of 5.0 and 5.10 the server's own modules cannot be imported."""
    monkeypatch.setitem(sys.modules, "lorafx.integrations.server.run", None)
    with pytest.raises(ConfigError, match=r"transformers 5\.23 or newer .*'transformers>=5\.23'"):
        check_requirements()


@pytest.mark.quick
def test_a_model_without_a_usable_tokenizer(files, tmp_path):
    from lorafx.integrations.server.run import opened

    folder = tmp_path / "model"
    shutil.copytree(files.model, folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    (folder / "config.json").write_text(json.dumps({"model_type": "nothing"}))
    with (
        pytest.raises(ConfigError, match="cannot be loaded"),
        opened(Settings(model=str(folder), adapters=files.adapters)),
    ):
        pass


MANY_NUMBERS_OF_ROWS = """
import os, torch
from lorafx.integrations.server.run import bound_kernels

bound_kernels()
weight = torch.ops.mkldnn._reorder_linear_weight(torch.ones(128, 128))

def resident(numbers):
    for rows in numbers:
        torch.ops.mkldnn._linear_pointwise(torch.ones(rows, 128), weight, None, "none", [], "")
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

before = resident(range(1, 300))
print(resident(range(300, 600)) - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="oneDNN is not in this torch")
def test_kernels_for_many_numbers_of_rows_take_bounded_memory():
    """oneDNN would keep 1,024 kernels of about a megabyte: 180 MB for these 300."""
    command = [sys.executable, "-c", MANY_NUMBERS_OF_ROWS]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    assert int(done.stdout) < 40e6
