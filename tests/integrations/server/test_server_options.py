"""Options under vLLM's names."""

from __future__ import annotations

import asyncio
import dataclasses
import datetime
import json
import os
import re
import shutil
import signal
import ssl
import sys
from concurrent.futures import ThreadPoolExecutor

import httpx2
import pytest
from served import SMALL, ask, client_of, free_port, plain, question, serving, wait_for
from step_logits import StepCounts
from waiting import LONG, until

from lorafx.errors import ConfigError
from lorafx.integrations.cli import main
from lorafx.integrations.cli.vllm_options import ABSENT, translated
from lorafx.integrations.server.settings import Settings

PATH = "/v1/completions"


@pytest.mark.quick
@pytest.mark.parametrize(
    ("given", "ours"),
    [
        ("m --lora-modules a=x b=y --port 1", "m --lora-modules a=x --lora-modules b=y --port 1"),
        ("m --lora_modules=a=x --enable-lora", "m --lora-modules=a=x"),
        ("m --enable-lora --max_loras 2", "m --max-loras 2"),
        (
            '--allowed-origins ["a","b"] --warmup',
            "--allowed-origins a --allowed-origins b --warmup",
        ),
        ("m --adapters x --max-rank 8", "m --adapters x --max-rank 8"),
    ],
)
def test_command_lines_of_vllm(given, ours):
    assert [*translated(given.split())] == ours.split()


@pytest.mark.quick
def test_options_that_only_vllm_has(files, monkeypatch):
    for name, why in ABSENT.items():
        with pytest.raises(ConfigError, match=re.escape(f"{name} is an option of vLLM's server")):
            [*translated(["m", name, "2"])]
        assert len(why) > 10
    monkeypatch.setattr("sys.argv", ["lorafx", "serve", str(files.model), "--swap_space=4"])
    with pytest.raises(SystemExit, match=r"^lorafx: --swap-space is .*--max-memory-percent"):
        main()


@pytest.mark.quick
@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"lora_modules": ("a",)}, "NAME=FOLDER"),
        ({"lora_modules": ("new=/nowhere",)}, "adapter_config.json"),
        ({"lora_modules": ("a1={adapters}/a2",)}, "two adapters are called 'a1'"),
        ({"ssl_keyfile": "k"}, "--ssl-certfile"),
        ({"ssl_certfile": "/nowhere"}, "no HTTPS with --ssl-certfile /nowhere"),
        ({"log_level": "loud"}, "--log-level"),
        ({"max_queue": 0}, "--max-queue"),
        ({"adapter_weight": ("a9=3",)}, "got 'a9=3', and there is no 'a9'; nearest"),
        ({"adapter_weight": ("a1=0",)}, "'--adapter-weight a1=0' has weight=0.0; a weight is"),
        ({"adapter_running": ("a1=2.5",)}, "--adapter-running a1=2.5' has most_running='2.5'"),
        ({"max_adapter_reads": 0}, "--max-adapter-reads"),
        ({"adapters": None, "resolve_adapters": True}, "--resolve-adapters needs the folder"),
    ],
)
def test_bad_values(files, change, word):
    given = {"model": str(files.model), "adapters": files.adapters}
    for name, value in change.items():
        if isinstance(value, tuple):
            value = tuple(text.replace("{adapters}", str(files.adapters)) for text in value)
        given[name] = value
    with pytest.raises(ConfigError, match=re.escape(word)):
        Settings(**given).tls()


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"max_model_len": 10_000}, "--max-model-len 10000 is more than the"),
        ({"chat_template": "/nowhere"}, "--chat-template /nowhere: neither a file"),
        ({"runner": "pooling", "adapter_weight": ("a1=2",)}, "tiny is served as an encoder"),
        ({"runner": "pooling", "prompt_lookup_num_tokens": 3}, "tiny is served as an encoder"),
    ],
)
def test_bad_values_of_the_model(files, change, word):
    with pytest.raises(ConfigError, match=re.escape(word)), serving(files, **change):
        pass


def test_names_modules_lengths_and_templates(files):
    modules = (f"b1={files.adapters / 'a1'}", f"b2={files.adapters / 'a2'}")
    given = {"adapters": None, "lora_modules": modules, "name": "small", "aliases": ("tiny",)}
    given |= {"max_model_len": 12, "max_num_seqs": 2, "allowed_origins": ("http://here",)}
    given["chat_template"] = "{% for m in messages %}{{ m.content }} w20 {% endfor %}"
    with serving(files, **given) as server:
        listed = [entry["id"] for entry in ask(server, "GET", "/v1/models").json()["data"]]
        assert listed == ["small", "tiny", "small:b1", "small:b2"]
        for name, parent in (("tiny", None), ("tiny:b2", "small"), ("b1", "small")):
            entry = ask(server, "GET", f"/v1/models/{name}").json()
            assert (entry["id"], entry["parent"]) == (name, parent)
        ids = files.tokenizer("w9 w12")["input_ids"]
        for name, adapter in (("tiny:b2", "a2"), ("small:b1", "a1"), ("tiny", None)):
            answer = ask(server, "POST", PATH, model=name, **question(PATH, "w9 w12", 5))
            assert plain(PATH, answer.json()).strip() == files.text(adapter, ids, 5)
        long = ask(server, "POST", PATH, model="tiny", **question(PATH, "w9 w12", 50)).json()
        assert long["usage"]["total_tokens"] <= 12
        chat = "/v1/chat/completions"
        answer = ask(server, "POST", chat, model="tiny:b1", **question(chat, "w9", 5)).json()
        ids = files.tokenizer("w9 w20", add_special_tokens=False)["input_ids"]
        assert plain(chat, answer).strip() == files.text("a1", ids, 5)
        assert server.engine.continuous_batching_config.max_requests_per_batch == 2
        origin = {"Origin": "http://here", "Access-Control-Request-Method": "POST"}
        preflight = asked_from(server, origin)
        assert preflight.headers["access-control-allow-origin"] == "http://here"
        assert asked_from(server, {**origin, "Origin": "http://there"}).status_code == 400


@pytest.mark.parametrize(
    "given",
    [{"prompt_lookup_num_tokens": 3}, {"assistant_model": "tiny", "num_assistant_tokens": 2}],
)
def test_tokens_are_guessed_ahead(files, given):
    if "assistant_model" in given:
        given = {**given, "assistant_model": str(files.model)}
    with serving(files, **given) as server:
        for adapter in ("a1", None):
            body = {"model": adapter or "tiny", **question(PATH, "w9 w12 w9 w12", 16)}
            answer = ask(server, "POST", PATH, **body).json()
            ids = files.tokenizer("w9 w12 w9 w12")["input_ids"]
            assert plain(PATH, answer).strip() == files.text(adapter, ids, 16)
        assert server.engine.drafts.accepted > 0


def test_weights_and_bounds_of_adapters(files):
    """Also of one that is loaded later; names are those of requests."""
    given = {"adapter_weight": ("tiny:a2=3", "tiny=0.5"), "adapter_running": ("a2=2", "late=1")}
    given |= {"allow_runtime_loading": True, "adapter_root": files.adapters}

    async def answers(server, models):
        async with client_of(server) as client:
            with server.engine.pause():
                bodies = [{"model": model, **question(PATH, "w9 w12", 5)} for model in models]
                tasks = [asyncio.create_task(client.post(PATH, json=body)) for body in bodies]
                await until(lambda: len(server.engine.sequences()["waiting"]) == len(models))
            return [plain(PATH, (await task).json()).strip() for task in tasks]

    with serving(files, **given) as server:
        ask(server, "POST", "/v1/load_lora_adapter", lora_name="late", lora_path="a3")
        seen, models = StepCounts(server.engine), {"tiny:a2": "a2", "late": "a3", "tiny": None}
        said = asyncio.run(answers(server, [*models] * 4))
    ids = files.tokenizer("w9 w12")["input_ids"]
    assert said == [files.text(adapter, ids, 5) for adapter in models.values()] * 4
    assert [seen.most(adapter) for adapter in ("a2", "late", "__base__")] == [2, 1, 4]


def asked_from(server, headers):
    async def once():
        async with client_of(server) as client:
            return await client.options(PATH, headers=headers)

    return asyncio.run(once())


def certificate(folder):
    """A key, and a certificate for localhost that it has signed itself."""
    pytest.importorskip("cryptography")  # a part of the extra `ray`
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    now = datetime.datetime.now(datetime.UTC)
    day = datetime.timedelta(days=1)
    made = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - day)
        .not_valid_after(now + day)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .sign(key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    (folder / "cert.pem").write_bytes(made.public_bytes(pem))
    form, none = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    (folder / "key.pem").write_bytes(key.private_bytes(pem, form, none))


def test_https_under_a_command_line_of_vllm(files, tmp_path, monkeypatch, capfd):
    certificate(tmp_path)
    port, process = free_port(), os.getpid()
    line = f"serve {files.model} --enable-lora --max-loras 2 --max-lora-rank 8 --port {port}"
    line += f" --lora-modules a={files.adapters}/a1 b={files.adapters}/a2 --max-model-len 30"
    line += f" --ssl-certfile {tmp_path}/cert.pem --ssl-keyfile {tmp_path}/key.pem"
    line += " --served-model-name one two --host localhost --uvicorn-log-level info"
    monkeypatch.setenv("LORAFX_START", "eager")
    small = [part for n, v in SMALL.items() for part in (f"--{n.replace('_', '-')}", str(v))]
    monkeypatch.setattr(sys, "argv", ["lorafx", *line.split(), *small])

    def talk():
        context = ssl.create_default_context(cafile=tmp_path / "cert.pem")
        with httpx2.Client(verify=context, base_url=f"https://localhost:{port}") as client:
            wait_for(client)
            body = {"model": "two:b", **question(PATH, "w9 w12", 5)}
            try:
                return client.post(PATH, json=body, timeout=LONG).json()
            finally:
                os.kill(process, signal.SIGTERM)

    with ThreadPoolExecutor(1) as pool:
        talking = pool.submit(talk)
        with pytest.raises(SystemExit) as ended:
            main()
    assert not ended.value.code
    ids = files.tokenizer("w9 w12")["input_ids"]
    assert plain(PATH, talking.result()).strip() == files.text("a2", ids, 5)
    shown = capfd.readouterr()
    assert re.search(rf"serving 'one' and 2 adapters on https://\S+:{port}/v1", shown.out)


def test_a_folder_without_a_tokenizer_is_refused_by_name(files, tmp_path):
    model = tmp_path / "no words"
    shutil.copytree(files.model, model)
    for file in model.glob("*token*"):
        file.unlink()
    refused = pytest.raises(ConfigError, match=r"no words has no tokenizer that can be read")
    with refused, serving(dataclasses.replace(files, model=model)):
        pass


@pytest.mark.parametrize("template", [{}, "x", {"fields": {"content": {"open": 3}}}])
def test_a_response_template_that_is_none_is_refused_at_the_start(files, tmp_path, template):
    model = tmp_path / "wrong"
    shutil.copytree(files.model, model)
    path = model / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "response_template": template}))
    refused = pytest.raises(ConfigError, match=r"cannot read the response_template of \S*wrong")
    with refused, serving(dataclasses.replace(files, model=model)):
        pass
