"""The parts of the Ray application that need no cluster."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import anthropic
import httpx2
import openai
import pytest
import torch
from ray.serve.metrics import Counter, Gauge
from served import SMALL
from waiting import LONG

from lorafx.errors import BatchError, CapacityError, ConfigError, UnknownAdapterError
from lorafx.integrations.server.ray import RaySettings, build
from lorafx.integrations.server.ray.application import Answer
from lorafx.integrations.server.ray.replica import Counts, HeldAdapter, Replica


def settings_of(files, **given: Any) -> RaySettings:
    given = {"model": str(files.model), "adapters": str(files.adapters), **SMALL, **given}
    return RaySettings(**given)


@pytest.fixture(scope="module")
def replica(files):
    replica = Replica(settings_of(files), held=2)
    yield replica
    replica.__del__()


def test_an_adapter_is_read_when_it_is_first_asked_for(replica, monkeypatch):
    compiled, read = replica._server.compiled, []
    load = compiled.load_adapter
    monkeypatch.setattr(
        compiled, "load_adapter", lambda f, name: (read.append(name), load(f, name))
    )

    async def run() -> None:
        await replica._load("a0")
        await replica._load("a0")
        with pytest.raises(UnknownAdapterError):
            await replica._load("absent")

    asyncio.run(run())
    assert read == ["a0"]
    compiled.unload_adapter("a0")


def test_a_dropped_adapter_stays_while_a_request_uses_it(replica):
    compiled = replica._server.compiled

    async def dropped() -> tuple[str, ...]:
        await replica._load("a0")
        held = HeldAdapter(lambda: replica._dropped.add("a0"))
        held.__del__()  # as Ray does; Python calls it again
        return compiled.adapters

    async def run() -> None:
        assert await dropped() == ("a0",)
        replica._users["a0"] += 1
        await replica._unload_dropped()
        assert compiled.adapters == ("a0",)
        await replica._load("a0")  # it is asked for again
        replica._users["a0"] -= 1
        await replica._unload_dropped()
        assert await dropped() == ("a0",)
        await replica._unload_dropped()
        assert compiled.adapters == ()

    asyncio.run(run())


def test_without_a_target_the_files_say_which_modules_carry_lora(files, replica):
    named = {"q_proj", "gate_proj", "embed_tokens", "lm_head"}
    assert named <= {site.path.rpartition(".")[2] for site in replica._server.compiled.sites}


CHUNK = {
    **{"type": "response.output_text.delta", "delta": "w45", "item_id": "x"},
    **{"output_index": 0, "content_index": 0, "sequence_number": 1, "logprobs": []},
}


def response(kind: bytes, *bodies: str) -> list[dict[str, Any]]:
    """The ASGI messages of an answer that is not at its end."""
    headers = [(b"content-type", kind)]
    return [
        {"type": "http.response.start", "status": 200, "headers": headers},
        *(
            {"type": "http.response.body", "body": body.encode(), "more_body": True}
            for body in bodies
        ),
    ]


@pytest.mark.quick
def test_clients_raise_where_a_stream_breaks_off():
    async def app(scope: Any, receive: Any, send: Any) -> None:
        answer = Answer(send)
        await answer.take(response(b"text/event-stream", f"data: {json.dumps(CHUNK)}\n\n"))
        assert answer.begun
        await answer.break_off()

    async def talk() -> None:
        transport = httpx2.ASGITransport(app=app)
        async with httpx2.AsyncClient(transport=transport) as http:
            client = openai.AsyncOpenAI(base_url="http://test/v1", api_key="none", http_client=http)
            stream = aiter(await client.responses.create(model="tiny", input="w9", stream=True))
            await anext(stream)
            with pytest.raises(openai.APIError, match="not the whole answer") as raised:
                await anext(stream)
            assert raised.value.code == "replica_failed"
            other = anthropic.AsyncAnthropic(base_url="http://test", api_key="x", http_client=http)
            asked = {"messages": [{"role": "user", "content": "w9"}], "max_tokens": 3}
            events = aiter(await other.messages.create(model="tiny", stream=True, **asked))
            with pytest.raises(anthropic.APIError, match="not the whole answer"):
                await anext(events)

    asyncio.run(talk())


@pytest.mark.quick
def test_nothing_of_an_answer_that_is_no_stream_is_sent_before_its_end():
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def run() -> None:
        answer = Answer(send)
        messages = response(b"application/json", "{", "}")
        await answer.take(messages)
        assert not answer.begun
        assert not sent
        await answer.end()
        assert sent == messages

    asyncio.run(run())


@pytest.mark.quick
def test_settings_from_a_command_line(files):
    given = {
        **{"model": str(files.model), "adapters": str(files.adapters), "num_gpus": "0.5"},
        **{"target": "q_proj,v_proj", "num_replicas": "2", "max_adapters": "3"},
        "max_host_bytes": "1000000",
        "deployment": '{"health_check_period_s": 3, "ray_actor_options": {"memory": 1000}}',
    }
    settings = build.__annotations__["args"].model_validate(given)  # as Ray does
    assert (settings.target, settings.max_adapters) == (("q_proj", "v_proj"), 3)
    assert settings.max_host_bytes == 1_000_000
    replicas, ingress = deployments(build(settings))
    assert replicas.num_replicas == 2
    assert replicas._deployment_config.health_check_period_s == 3
    assert replicas._deployment_config.graceful_shutdown_timeout_s == 600
    actor = {"num_gpus": 0.5, "num_cpus": 1, "memory": 1000}
    assert replicas.ray_actor_options == actor
    assert ingress.num_replicas == 1
    auto = deployments(build(settings_of(files, num_replicas="auto")))[0]
    assert auto._deployment_config.autoscaling_config is not None


def deployments(application: Any) -> tuple[Any, Any]:
    """The replicas' and the ingress's."""
    ingress = application._bound_deployment
    return ingress.init_args[0]._bound_deployment, ingress


@pytest.mark.quick
@pytest.mark.parametrize(
    ("change", "error", "word"),
    [
        ({"adapters": "/nowhere"}, ConfigError, "not a folder"),
        ({"max_rank": 1}, CapacityError, "rank"),
        ({"adaptors": "x"}, ConfigError, "adaptors"),
        ({"held": 0}, ConfigError, "held"),
    ],
)
def test_bad_settings_are_refused_before_anything_is_started(files, change, error, word):
    with pytest.raises(error, match=word):
        build(settings_of(files, **change))


@pytest.mark.slow
def test_counts_are_told_to_ray(files, replica, monkeypatch):
    """Each check of a replica's health tells what has come since; sizes are told as they are."""
    told: dict[tuple[str, str], float] = {}

    def inc(self, value=1.0, tags=None):
        key = self.info["name"], *(tags or {"": ""}).values()
        told[key] = told.get(key, 0) + value

    def put(self, value, tags=None):
        told[self.info["name"], tags["place"]] = value

    monkeypatch.setattr(Counter, "inc", inc)
    monkeypatch.setattr(Gauge, "set", put)
    monkeypatch.setattr(
        replica, "_counts", Counts(replica._server.compiled.stats, replica._server.engine.health)
    )
    server = replica._server
    for name in ("a0", "a3"):
        server.compiled.load_adapter(files.adapters / name, name)
        added = server.engine.add_request([5, 6], adapter=name, max_new_tokens=2)
        assert server.engine.get_result(added, timeout=LONG).error is None
        replica.check_health()
    stats = server.compiled.stats()
    for place in ("banks", "host", "disk"):
        assert told["lorafx_adapter_bytes", place] == stats.nbytes[place] > 0
    for place, counts in stats.places.items():
        for name in ("hits", "misses", "evictions"):
            assert told.get((f"lorafx_place_{name}", place), 0) == getattr(counts, name)
    assert told["lorafx_place_hits", "host"] > 0
    assert told["lorafx_tokens", "a3"] == stats.tokens["a3"]
    assert told["lorafx_adapter_loads", ""] == stats.loads > 0
    for name in ("a0", "a3"):
        server.compiled.unload_adapter(name)


def test_an_engine_that_has_failed_is_not_healthy(replica, monkeypatch):
    """The last one, since the engine is gone after it."""
    replica.check_health()

    def fail(**_: Any) -> None:
        raise torch.AcceleratorError("out of order")

    engine = replica._server.engine
    monkeypatch.setattr(engine, "_forward", fail)
    engine.add_request([5, 6], adapter=None)
    engine._generation_thread.join(LONG)
    with pytest.raises(BatchError, match="out of order"):
        replica.check_health()
