"""A local Ray cluster with the application on it, asked over HTTP."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx2
import pytest
import ray
from ray import serve
from served import SMALL, Files, free_port, ids_of, plain, question, said

from lorafx.integrations.server.ray import RaySettings, build

COMPLETIONS = "/v1/completions"


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
        answer = httpx2.post(self.url + path, json=body, timeout=120)
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


def prompts(count: int, seed: int) -> list[str]:
    draw = random.Random(seed)
    return [
        " ".join(f"w{draw.randrange(7, 61)}" for _ in range(draw.randrange(1, 12)))
        for _ in range(count)
    ]


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
