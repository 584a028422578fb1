"""What a trainer elsewhere asks for: it pauses the engine, sends adapters and base weights, and
learns which versions have answered."""

from __future__ import annotations

import asyncio
import json
import logging
from contextlib import asynccontextmanager

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save
from served import anew, asgi, ask, client_of, events, gated, idle, question, serving
from waiting import LONG, until

PATH = "/v1/completions"
BINARY = {"content-type": "application/octet-stream"}
MODES = ("abort", "wait", "keep")


@pytest.fixture(scope="module")
def controlled(files):
    with serving(files, allow_control=True, max_rank=8) as server:
        yield server
        idle(server)


@pytest.fixture
def versions(controlled):
    """Adapters with their versions, which a refused request does not change."""
    return dict(controlled.compiled.adapter_versions)


def content_of(files, adapter: str, factor: float = 1.0) -> bytes:
    """An adapter as one file, of whose deltas each is `factor` times as large."""
    folder = files.adapters / adapter
    tensors = load_file(folder / "adapter_model.safetensors")
    tensors = {k: t * factor if "lora_B" in k else t for k, t in tensors.items()}
    return save(tensors, {"adapter_config": (folder / "adapter_config.json").read_text()})


def weights_of(files, factor: float = 1.0) -> dict[str, torch.Tensor]:
    """The base weights, of which each matrix of an MLP is `factor` times as large."""
    base = files.case.base.state_dict()
    return {k: (v * factor if "mlp" in k else v).clone() for k, v in base.items()}


def post(server, path: str, content: bytes | None = None, **query):
    async def once():
        async with client_of(server) as client:
            kind = {} if content is None else BINARY
            return await client.post(path, params=query, content=content, headers=kind)

    return asyncio.run(once())


def text(server, model: str = "tiny", new: int = 8, words: str = "w9 w12"):
    answer = ask(server, "POST", PATH, model=model, **question(PATH, words, new, ignore_eos=True))
    assert answer.status_code == 200, answer.text
    return answer.json()


@asynccontextmanager
async def under_way(server, **fields):
    """A client, and a request of 12 tokens whose first ones are there and whose step waits."""
    async with client_of(server) as client:
        with gated(server, free=3) as gate:
            body = {"model": "tiny:a1", **question(PATH, "w9 w12", 12, ignore_eos=True, **fields)}
            running = asyncio.create_task(client.post(PATH, json=body, timeout=LONG))
            await until(lambda: gate.steps > gate.free)
            yield client, gate, running


async def told(server, mode):
    """Wait until the engine knows of a pause of this mode; "wait" is that of other changes too."""
    engine = server.engine
    paused = engine.background_thread_status.is_pause_requested
    stopped = {"abort": engine.cancel_queue.qsize, "keep": paused}
    await until(stopped.get(mode, lambda: server.control._closed))


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/pause"),
        ("POST", "/resume"),
        ("GET", "/is_paused"),
        ("POST", "/reset_prefix_cache"),
        ("POST", "/update_weights"),
        ("POST", "/v1/load_lora_adapter"),
    ],
)
def test_control_is_off_by_default(server, path, method):
    async def once():
        async def chunks():
            raise AssertionError("read")
            yield b""

        upload = {"content": chunks(), "headers": BINARY} if path.endswith(("adapter", "s")) else {}
        async with client_of(server) as client:
            return await client.request(method, path, **upload)

    answer = asyncio.run(once())
    assert answer.status_code == 403
    assert "--allow-control" in answer.json()["error"]["message"]


def test_control_needs_the_key(server, files):
    locked = anew(server, files, allow_control=True, api_key="s3cret")
    assert [post(locked, path, b"").status_code for path in ("/pause", "/update_weights")] == [
        401
    ] * 2


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_pause(files, controlled, mode, stream):
    """What is under way ends as the mode says, and what comes later waits for /resume."""

    async def talk():
        async with under_way(controlled, stream=stream) as (client, gate, running):
            pausing = asyncio.create_task(client.post("/pause", params={"mode": mode}))
            await told(controlled, mode)
            gate.open.set()
            assert (await pausing).json() == {"status": "paused"}
            later = asyncio.create_task(
                client.post(PATH, json={"model": "tiny:a2", **question(PATH, "w9", 5)})
            )
            await until(lambda: controlled.control._closed._waiters)
            waits = [running.done(), later.done(), (await client.get("/is_paused")).json()]
            assert (await client.post("/resume")).json() == {"status": "resumed"}
            resumed = (await client.get("/is_paused")).json()
            return waits, resumed, await running, await later

    waits, resumed, answer, later = asyncio.run(talk())
    assert waits == [mode != "keep", False, {"is_paused": True}]
    assert resumed == {"is_paused": False}
    whole = text(controlled, "tiny:a1", 12)["choices"][0]["text"]
    choices = (
        [e["choices"][0] for e in events(answer.text)] if stream else [answer.json()["choices"][0]]
    )
    said = "".join(choice["text"] for choice in choices)
    if mode == "abort":
        assert choices[-1]["finish_reason"] == "abort"
        assert said
        assert said != whole
        assert whole.startswith(said)
    else:
        assert (choices[-1]["finish_reason"], said) == ("length", whole)
    ids = files.tokenizer("w9")["input_ids"]
    assert later.json()["choices"][0]["text"].strip() == files.text("a2", ids, 5)


def test_every_sequence_is_aborted(controlled):
    """Also those that have not begun: of several prompts, and forks."""

    async def talk():
        async with under_way(controlled) as (client, gate, running):
            body = {"model": "tiny:a2", "prompt": ["w9", "w8"], "n": 3, "max_tokens": 9}
            several = asyncio.create_task(client.post(PATH, json=body))
            await until(lambda: len(controlled.engine._outputs.names) == 7)
            pausing = asyncio.create_task(client.post("/pause"))
            await told(controlled, "abort")
            gate.open.set()
            await pausing
            answers = [await running, await several]
            await client.post("/resume")
            return answers

    reasons = [[c["finish_reason"] for c in a.json()["choices"]] for a in asyncio.run(talk())]
    assert reasons == [["abort"], ["abort"] * 6]
    assert not controlled.engine.busy


def test_old_form_of_waiting(controlled):
    async def talk():
        async with under_way(controlled) as (client, gate, running):
            query = {"wait_for_inflight_requests": "true", "clear_cache": "false"}
            pausing = asyncio.create_task(client.post("/pause", params=query))
            await told(controlled, "wait")
            gate.open.set()
            await pausing
            await client.post("/resume")
            return await running

    assert asyncio.run(talk()).json()["choices"][0]["finish_reason"] == "length"
    refused = post(controlled, "/pause", mode="never")
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "mode")
    assert "`mode`" in refused.json()["error"]["message"]


def test_a_client_that_leaves_does_not_undo_its_pause(controlled):
    async def talk():
        async with under_way(controlled) as (client, gate, running):
            pausing = asyncio.create_task(client.post("/pause", params={"mode": "wait"}))
            await told(controlled, "wait")
            pausing.cancel()
            gate.open.set()
            await running
            await until(lambda: controlled.control.paused)
            await client.post("/resume")

    asyncio.run(asyncio.wait_for(talk(), LONG))


def test_an_adapter_as_a_body(files, controlled):
    ids = files.tokenizer("w9 w12")["input_ids"]
    load = "/v1/load_lora_adapter"
    first = post(controlled, load, content_of(files, "a1"), lora_name="policy")
    assert first.status_code == 200, first.text
    again = post(controlled, load, content_of(files, "a2"), lora_name="policy")
    assert (again.status_code, "is loaded" in again.text) == (400, True)
    answer = text(controlled, "policy")
    assert answer["choices"][0]["text"].strip() == files.text("a1", ids, 8)
    assert answer["adapter_version"] == int(first.headers["x-adapter-version"])
    assert (text(controlled)["adapter_version"], answer["weights_version"]) == (None, 0)
    gone = ask(controlled, "POST", "/v1/unload_lora_adapter", lora_name="policy")
    assert gone.status_code == 200, gone.text


@pytest.mark.parametrize("stream", [False, True])
def test_requests_keep_the_version_that_they_began_with(files, controlled, stream):
    load, query = "/v1/load_lora_adapter", {"lora_name": "a1", "load_inplace": "true"}

    async def talk():
        async with under_way(controlled, stream=stream) as (client, gate, running):
            contents = [content_of(files, name) for name in ("a2", "a1")]
            new = await client.post(load, params=query, content=contents[0], headers=BINARY)
            gate.open.set()
            old = await running
            body = {"model": "tiny:a1", **question(PATH, "w9 w12", 12, ignore_eos=True)}
            now = await client.post(PATH, json=body)
            await client.post(load, params=query, content=contents[1], headers=BINARY)
            return new, old, now.json()

    before = controlled.compiled.adapter_versions["a1"]
    new, old, now = asyncio.run(talk())
    chunks = events(old.text) if stream else [old.json()]
    ids = files.tokenizer("w9 w12")["input_ids"]
    wanted = [files.text(name, ids, 12).split()[:4] for name in ("a1", "a2")]
    said = "".join(chunk["choices"][0]["text"] for chunk in chunks)
    assert [said.split()[:4], now["choices"][0]["text"].split()[:4]] == wanted
    assert chunks[-1]["adapter_version"] == before
    assert now["adapter_version"] == int(new.headers["x-adapter-version"]) > before


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/responses", "/v1/messages"])
@pytest.mark.parametrize("stream", [False, True])
def test_versions_on_all_routes(controlled, path, stream):
    body = {"model": "tiny:a1", **question(path, "w9", 4, stream=stream)}
    answer = ask(controlled, "POST", path, **body)
    lines = answer.text.splitlines()
    data = [line[6:] for line in lines if line.startswith("data: {")] if stream else [answer.text]
    last = json.loads(data[-1])
    last = last.get("response", last)
    assert last["adapter_version"] == controlled.compiled.adapter_versions["a1"]
    assert last["weights_version"] == controlled.compiled._session.counts.writes


def cut(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {k: v[:, :3].contiguous() if "lora_A" in k else v for k, v in tensors.items()}


def moved(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {k.replace("lm_head", "lm_tail"): v for k, v in tensors.items()}


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda _, metadata: b"no tensors at all", "safetensors"),
        (lambda tensors, _: save(tensors), "config"),
        (lambda tensors, metadata: save(cut(tensors), metadata), "shape"),
        (lambda tensors, metadata: save(moved(tensors), metadata), "lm_tail"),
    ],
)
def test_adapters_that_do_not_fit(files, controlled, versions, change, word):
    folder = files.adapters / "a1"
    metadata = {"adapter_config": (folder / "adapter_config.json").read_text()}
    content = change(load_file(folder / "adapter_model.safetensors"), metadata)
    query = {"lora_name": "a1", "load_inplace": "true"}
    answer = post(controlled, "/v1/load_lora_adapter", content, **query)
    assert (answer.status_code, word in answer.text) == (400, True), answer.text
    for name in ("", "__base__", "a\nb", "tiny"):
        fitting = content_of(files, "a1")
        assert post(controlled, "/v1/load_lora_adapter", fitting, lora_name=name).status_code == 400
    assert controlled.compiled.adapter_versions == versions


@pytest.mark.parametrize("path", ["/v1/load_lora_adapter", "/update_weights"])
def test_uploads_that_are_too_large(server, files, path):
    small, read = anew(server, files, allow_control=True, max_upload_bytes=1000), []

    async def chunks():
        for start in range(100):
            read.append(start)
            yield bytes(100)

    for content in (bytes(1001), chunks()):
        answer = post(small, path, content, lora_name="policy")
        assert answer.status_code == 413
        assert "--max-upload-bytes" in answer.json()["error"]["message"]
    assert len(read) == 11  # nothing more was read


@pytest.mark.parametrize("path", ["/v1/load_lora_adapter", "/update_weights"])
def test_a_client_that_leaves_in_the_middle_of_a_body(controlled, versions, path, caplog):
    """It was a failure of the server."""

    async def leave():
        return {"type": "http.disconnect"}

    async def send(message): ...

    with caplog.at_level(logging.INFO, "lorafx.requests"):
        asyncio.run(asgi(controlled, path, b"a beginning", leave, send))
    assert f"POST {path} 499" in caplog.text
    assert controlled.compiled.adapter_versions == versions


def test_base_weights_as_a_body(files, controlled, versions):
    """All answers that begin afterwards are by the new weights, and none finds old pages."""
    before, version = text(controlled, words="w9 " * 9), controlled.compiled._session.counts.writes
    answer = post(controlled, "/update_weights", save(weights_of(files, 1.5)))
    assert answer.status_code == 200, answer.text
    assert not answer.json()["missing"]
    changed = text(controlled, words="w9 " * 9)
    assert (before["weights_version"], changed["weights_version"]) == (version, version + 1)
    model = files.case.model()
    model.load_state_dict(weights_of(files, 1.5))
    ids = torch.tensor([files.tokenizer("w9 " * 9)["input_ids"]])
    said = model.generate(ids, max_new_tokens=8, min_new_tokens=8, do_sample=False, pad_token_id=0)
    want = files.tokenizer.decode(said[0, ids.shape[1] :], skip_special_tokens=True)
    assert changed["choices"][0]["text"].strip() == want != before["choices"][0]["text"].strip()
    assert post(controlled, "/update_weights", save(weights_of(files))).status_code == 200
    assert text(controlled, words="w9 " * 9)["choices"] == before["choices"]
    assert controlled.compiled.adapter_versions == versions


def test_base_weights_that_do_not_fit(files, controlled):
    before, good = text(controlled), weights_of(files, 1.5)
    name = next(name for name in good if "mlp" in name)
    bad = {
        "shape": {**good, name: good[name][:3].contiguous()},
        "unknown": {**good, "model.layers.9.x": torch.ones(2)},
        "missing": {key: value for key, value in good.items() if key != name},
    }
    for tensors in bad.values():
        answer = post(controlled, "/update_weights", save(tensors))
        assert answer.status_code == 400, answer.text
        assert "old weights stay" in answer.json()["error"]["message"]
    assert post(controlled, "/update_weights", b"nothing").status_code == 400
    for tensors in ({}, {f"other.{key}": value for key, value in good.items()}):
        answer = post(controlled, "/update_weights", save(tensors), strict=False)
        assert (answer.status_code, "has a place in the model" in answer.text) == (400, True)
    answer = ask(controlled, "POST", "/update_weights", update_info={})
    assert (answer.status_code, "octet-stream" in answer.text) == (400, True)
    after = text(controlled)
    assert after["choices"] == before["choices"]
    assert after["weights_version"] == before["weights_version"]


def test_base_weights_wait_for_what_is_under_way(files, controlled):
    """Which ends by the old weights; sequences that stand still are not given new ones."""
    whole = text(controlled, "tiny:a1", 12)["choices"][0]["text"]

    async def talk():
        new, old = save(weights_of(files, 1.5)), save(weights_of(files))
        async with under_way(controlled) as (client, gate, running):
            keeping = asyncio.create_task(client.post("/pause", params={"mode": "keep"}))
            await told(controlled, "keep")
            gate.open.set()
            await keeping
            refused = await client.post("/update_weights", content=new, headers=BINARY)
            await client.post("/resume")
            first = await running
        async with under_way(controlled) as (client, gate, running):
            updating = asyncio.create_task(
                client.post("/update_weights", content=new, headers=BINARY)
            )
            await told(controlled, "wait")
            gate.open.set()
            second = await running
            assert (await updating).status_code == 200
            assert (await client.post("/update_weights", content=old, headers=BINARY)).is_success
        return refused, first, second

    refused, *answers = asyncio.run(talk())
    assert refused.status_code == 409
    assert [answer.json()["choices"][0]["text"] for answer in answers] == [whole] * 2


def test_reset_prefix_cache(controlled):
    async def while_busy():
        async with under_way(controlled) as (client, gate, running):
            resetting = asyncio.create_task(client.post("/reset_prefix_cache"))
            await told(controlled, "keep")
            gate.open.set()
            answer = await resetting
            await running
            return answer.json()

    assert asyncio.run(while_busy()) == {"success": False}
    cache = controlled.engine.batch_processor.cache
    text(controlled, words="w9 " * 20)
    idle(controlled)
    kept = [len(a.ledger.cached_blocks) for a in cache.cache_allocators.values()]
    assert max(kept) > 0
    assert post(controlled, "/reset_prefix_cache").json() == {"success": True}
    assert not any(len(a.ledger.cached_blocks) for a in cache.cache_allocators.values())
    assert text(controlled, words="w9 " * 20)["choices"]


def test_a_trainer_over_http(files, controlled):
    """Steps of an optimiser; after each the adapter is sent and sampled from, and the
    log-probabilities are the trainer's own, by the ids that TRL's client reads."""
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    trainer = get_peft_model(files.case.model(), config)
    optimiser = torch.optim.SGD(trainer.parameters(), lr=0.5)
    seen = []
    for step in range(3):
        loss = trainer(torch.tensor([[9, 31, 8, 12]]), labels=torch.tensor([[9, 31, 8, 12]])).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        state = {
            k.replace(".default", ""): v.detach().contiguous()
            for k, v in trainer.state_dict().items()
            if "lora_" in k
        }
        fields = {**config.to_dict(), "target_modules": sorted(config.target_modules)}
        content = save(state, {"adapter_config": json.dumps(fields, default=str)})
        sent = post(
            controlled, "/v1/load_lora_adapter", content, lora_name="policy", load_inplace=step > 0
        )
        assert sent.status_code == 200, sent.text
        body = question(
            PATH,
            "w9 w12",
            6,
            ignore_eos=True,
            logprobs=0,
            return_token_ids=True,
            return_tokens_as_token_ids=True,
            temperature=1.0,
            seed=step,
        )
        answer = ask(controlled, "POST", PATH, model="policy", **body).json()
        (choice,) = answer["choices"]
        assert answer["adapter_version"] == int(sent.headers["x-adapter-version"])
        named = [int(name.removeprefix("token_id:")) for name in choice["logprobs"]["tokens"]]
        assert named == choice["token_ids"]
        ids = torch.tensor([choice["prompt_token_ids"] + choice["token_ids"]])
        with torch.no_grad():
            scores = trainer(ids).logits[0].log_softmax(-1)
        start = len(choice["prompt_token_ids"])
        want = [float(scores[start - 1 + i, token]) for i, token in enumerate(choice["token_ids"])]
        assert choice["logprobs"]["token_logprobs"] == pytest.approx(want, abs=1e-5)
        assert [*choice["logprobs"]["top_logprobs"][0]] == [f"token_id:{choice['token_ids'][0]}"]
        seen.append(want)
    assert seen[0] != seen[1] != seen[2]
    ask(controlled, "POST", "/v1/unload_lora_adapter", lora_name="policy")
