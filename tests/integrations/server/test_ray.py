"""On Ray Serve: two replicas answer what dense merge generates, also where one of them dies."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx2
import openai
import pytest
import ray
from ray import serve
from served import (
    SMALL,
    Files,
    events,
    free_port,
    ids_of,
    plain,
    prompts,
    question,
    said,
    write_files,
)
from waiting import LONG, wait_until

from lorafx.integrations.server.ray import RaySettings, build

pytestmark = pytest.mark.slow  # a cluster: seven processes, four of which import torch

COMPLETIONS = "/v1/completions"
ROUTES = ("/v1/chat/completions", COMPLETIONS, "/v1/responses")
ADAPTERS = (None, "a0", "a1", "a2", "a3", "a4")
#: Fewer than there are adapters, and fewer slots still.
HELD, SLOTS = 2, 1


@dataclass
class Served:
    """The application, over HTTP."""

    files: Files
    url: str
    metrics: str

    def body(self, path: str, adapter: str | None, words: str, new: int, **others: Any) -> dict:
        name = "tiny" if adapter is None else f"tiny:{adapter}"
        return {"model": name, **question(path, words, new, **others)}

    def ask(self, path: str, adapter: str | None, words: str, new: int, stream: bool) -> str:
        """What is answered."""
        body = self.body(path, adapter, words, new, stream=stream)
        answer = httpx2.post(self.url + path, json=body, timeout=LONG)
        assert answer.status_code == 200, answer.text
        if stream:
            return said(path, answer.text).strip()
        return plain(path, answer.json()).strip()

    def want(self, path: str, adapter: str | None, words: str, new: int) -> str:
        return self.files.text(adapter, ids_of(self.files, path, words), new)

    def home(self, adapter: str) -> str:
        """The replica that answers a request."""

        def run() -> dict[str, int]:
            return inside(lambda replica: replica._server.compiled.stats().tokens.get(adapter, 0))

        before = run()
        self.ask(COMPLETIONS, adapter, "w9 w12", 2, False)
        changed = [name for name, tokens in run().items() if tokens != before[name]]
        assert len(changed) == 1
        return changed[0]

    def lasting(self, adapter: str, new: int, count: int) -> list[str]:
        """Prompts whose answers have that many tokens."""
        found: list[str] = []
        for words in prompts(40, seed=2):
            if len(self.want(COMPLETIONS, adapter, words, new).split()) > new * 0.8:
                found.append(words)
            if len(found) == count:
                return found
        raise AssertionError(f"{len(found)} prompts of {adapter} have long answers")


def inside(look: Callable[[Any], Any]) -> dict[str, Any]:
    """What `look` finds in each replica, by the replica's name."""
    found = {}
    for actor in ray.util.list_named_actors(all_namespaces=True):
        name = actor["name"]
        if name.startswith("SERVE_REPLICA::default#Replica#"):
            handle = ray.get_actor(name, namespace="serve")
            found[name] = handle.__ray_call__.remote(
                lambda self: look(self._replica_impl._user_callable_wrapper.user_callable)
            )
    return dict(zip(found, ray.get(list(found.values())), strict=True))


@contextmanager
def cluster(files: Files, **settings: Any) -> Iterator[Served]:
    """The application on a cluster of its own, with these settings."""
    variables = {
        **{"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"},
        # Beside other tests a process may take long to start.
        **{f"RAY_SERVE_PROXY_{check}_CHECK_TIMEOUT_S": "60" for check in ("READY", "HEALTH")},
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        ray.init(
            address="local",  # not a cluster that runs here already
            num_cpus=4,
            include_dashboard=False,
            object_store_memory=80 * 2**20,
            log_to_driver=False,
            _metrics_export_port=(metrics := free_port()),
        )
        try:
            port = free_port()
            serve.start(http_options={"port": port})
            given = {**SMALL, "num_blocks": 1024, "model": str(files.model), **settings}
            serve.run(build(RaySettings(adapters=str(files.adapters), **given)))
            host = "http://127.0.0.1"
            yield Served(files, f"{host}:{port}", f"{host}:{metrics}/metrics")
        finally:
            serve.shutdown()
            ray.shutdown()


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    files = write_files(tmp_path_factory.mktemp("ray"), max_position_embeddings=256)
    deployment = {"health_check_period_s": 1}
    with cluster(
        files, max_adapters=SLOTS, held=HELD, num_replicas=2, deployment=deployment
    ) as served:
        yield served


def test_more_adapters_than_the_replicas_hold(served):
    work = [
        (ROUTES[i % 3], ADAPTERS[i % 6], words, 1 + (5 * i) % 13, i % 4 == 0)
        for i, words in enumerate(prompts(36, seed=1))
    ]
    with ThreadPoolExecutor(12) as clients:
        texts = list(clients.map(lambda one: served.ask(*one), work))
    different = 0
    for one, text in zip(work, texts, strict=True):
        path, adapter, words, new, _ = one
        want = served.want(path, adapter, words, new)
        assert text == want, one
        different += want != served.want(path, None, words, new)
    assert different >= 20  # the base's answers would not do


def test_requests_go_to_the_replica_that_holds_their_adapter(served):
    """Two replicas hold two adapters each, so four adapters need not be loaded again."""
    adapters = ("a0", "a1", "a2", "a3")
    for adapter in adapters:
        served.ask(COMPLETIONS, adapter, "w9 w12", 2, False)
        time.sleep(0.5)  # Ray hears ten times a second what a replica holds
    homes = {adapter: served.home(adapter) for adapter in adapters}
    assert sorted(Counter(homes.values()).values()) == [2, 2]
    for _ in range(3):
        for adapter in adapters:
            assert served.home(adapter) == homes[adapter]


def test_names_that_are_not_there(served, tmp_path):
    client = openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0)
    with pytest.raises(openai.NotFoundError, match="nearest: tiny:a"):
        client.completions.create(model="tiny:a7", prompt="w9")
    for model in ("tiny:..", "tiny:", f"tiny:{'x' * 5000}", "tiny:a/../a1", "tiny:\0", "a7"):
        with pytest.raises(openai.NotFoundError):
            client.completions.create(model=model, prompt="w9")
    names = [f"a{i}" for i in range(5)]
    listed = [model.id for model in client.models.list()]
    assert listed == ["tiny", *(f"tiny:{name}" for name in names)]
    for name in names:  # which also the ingress has to know
        answer = client.completions.create(model=name, prompt="w9 w12", max_tokens=4)
        assert answer.choices[0].text.strip() == served.want(COMPLETIONS, name, "w9 w12", 4)
    assert httpx2.post(f"{served.url}{COMPLETIONS}", content="{").status_code == 400


def test_an_adapter_that_comes_and_one_that_is_broken(served):
    shutil.copytree(served.files.adapters / "a2", served.files.adapters / "new")
    broken = served.files.adapters / "broken"
    shutil.copytree(served.files.adapters / "a2", broken)
    (broken / "adapter_model.safetensors").write_bytes(b"nothing")
    try:
        assert served.ask(COMPLETIONS, "new", "w9 w12", 5, False) == served.want(
            COMPLETIONS, "a2", "w9 w12", 5
        )
        body = served.body(COMPLETIONS, "broken", "w9", 5)
        answer = httpx2.post(served.url + COMPLETIONS, json=body, timeout=LONG)
        assert answer.status_code == 500
        assert "broken" in answer.json()["error"]["message"]
    finally:
        shutil.rmtree(broken)
        shutil.rmtree(served.files.adapters / "new")


def test_ray_exports_the_counts(served):
    lines: list[str] = []

    def counted() -> bool:
        lines[:] = httpx2.get(served.metrics, timeout=LONG).text.splitlines()
        tokens = [line for line in lines if line.startswith("ray_lorafx_tokens")]
        return any('adapter="a1"' in line and 'deployment="Replica"' in line for line in tokens)

    wait_until(counted)
    assert any(line.startswith("ray_lorafx_adapter_evictions") for line in lines)
    for place in ("banks", "host"):
        own = [line for line in lines if f'place="{place}"' in line and 'replica="' in line]
        (nbytes, *_) = [line for line in own if line.startswith("ray_lorafx_adapter_bytes{")]
        assert float(nbytes.split()[-1]) > 0


def test_a_client_that_goes_away(served):
    """Its request is cancelled with the engine of its replica."""
    words, new = served.lasting("a1", 240, 1)[0], 240

    def tokens() -> int:
        return sum(inside(lambda r: r._server.compiled.stats().tokens.get("a1", 0)).values())

    before = tokens()
    body = served.body(COMPLETIONS, "a1", words, new, stream=True)
    with httpx2.stream("POST", served.url + COMPLETIONS, json=body, timeout=LONG) as answer:
        next(answer.iter_text())

    def pending(replica: Any) -> bool:
        return replica._server.engine.batch_processor.has_pending_requests()

    wait_until(lambda: not any(inside(pending).values()))
    assert tokens() - before < new


def test_a_replica_that_dies_under_load(served):
    """What has not begun is answered by the other replica. A stream that has begun ends with an
    error, and what it said is right."""
    new = 150
    served.ask(COMPLETIONS, "a1", "w9 w12", 2, False)
    time.sleep(0.5)
    home = served.home("a1")
    process = inside(lambda _: os.getpid())[home]
    work = [("a1", words) for words in served.lasting("a1", new, 3)]
    others = [(None, words) for words in prompts(4, 3)] + [("a3", words) for words in prompts(4, 4)]
    begun = threading.Barrier(3)

    def stream(words: str) -> tuple[str, bool]:
        """What was said, and whether it ended with an error."""
        body = served.body(COMPLETIONS, "a1", words, new, stream=True)
        with httpx2.stream("POST", served.url + COMPLETIONS, json=body, timeout=LONG) as answer:
            assert answer.status_code == 200
            chunks = answer.iter_text()
            text = next(chunks)
            begun.wait(LONG)
            text += "".join(chunks)
        found = events(text)
        broken = "error" in found[-1]
        if broken:
            assert found.pop()["error"]["code"] == "replica_failed"
        else:
            assert found[-1]["choices"][0]["finish_reason"]
        return "".join(event["choices"][0]["text"] for event in found).strip(), broken

    with ThreadPoolExecutor(20) as clients:
        whole = [
            clients.submit(served.ask, COMPLETIONS, adapter, words, new, False)
            for adapter, words in [*work, *others]
        ]
        streams = [clients.submit(stream, words) for _, words in work[:2]]
        begun.wait(LONG)
        os.kill(process, signal.SIGKILL)
        assert not any(one.done() for one in whole[: len(work)])  # they were under way
        for one, (adapter, words) in zip(whole, [*work, *others], strict=True):
            assert one.result(LONG) == served.want(COMPLETIONS, adapter, words, new), adapter
        for one, (_, words) in zip(streams, work, strict=False):
            text, broken = one.result(LONG)
            assert broken
            assert served.want(COMPLETIONS, "a1", words, new).startswith(text)


def test_a_replica_that_is_stopped_answers_first(served):
    """Requests that are under way when the application is deleted are answered to their end."""
    words, new = served.lasting("a1", 150, 1)[0], 150
    body = json.dumps(served.body(COMPLETIONS, "a1", words, new, stream=True)).encode()
    scope = {
        **{"type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST"},
        **{"scheme": "http", "path": COMPLETIONS, "raw_path": COMPLETIONS.encode()},
        **{"query_string": b"", "headers": [(b"content-type", b"application/json")]},
    }
    replicas = serve.get_deployment_handle("Replica", "default")
    messages = replicas.options(stream=True, multiplexed_model_id="a1").answer.remote(scope, body)
    got = list(next(messages))
    # Not to its end: a replica that is just being started takes long to stop.
    serve.delete("default", _blocking=False)
    wait_until(lambda: serve.status().applications["default"].status == "DELETING")
    rest = [message for ready in messages for message in ready]
    assert len(rest) > 10  # the answer was under way
    got += rest
    text = b"".join(message.get("body", b"") for message in got).decode()
    assert said(COMPLETIONS, text).strip() == served.want(COMPLETIONS, "a1", words, new)
