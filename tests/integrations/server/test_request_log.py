"""What is logged and counted of requests."""

from __future__ import annotations

import asyncio
import logging
import re

import pytest
from prometheus_client.parser import text_string_to_metric_families
from served import ask, client_of, gated, idle, ids_of, question
from waiting import until

from lorafx.integrations.server.metrics import OTHERS, Labels

ROUTES = ("/v1/chat/completions", "/v1/completions", "/v1/responses")


def samples(server):
    """The samples of /metrics: (name, labels without those that all have) -> value."""
    found = {}
    for family in text_string_to_metric_families(ask(server, "GET", "/metrics").text):
        for sample in family.samples:
            if sample.name.startswith("vllm:") and family.name != "vllm:lora_requests_info":
                assert sample.labels.pop("model_name") == "tiny"
                assert sample.labels.pop("engine") == "0"
            found[sample.name, tuple(sample.labels.values())] = sample.value
    return found


@pytest.mark.parametrize("path", ROUTES)
@pytest.mark.parametrize("stream", [False, True])
def test_a_line_for_each_request(files, server, caplog, path, stream):
    body = question(path, "w9 w31 w8", 6, stream=stream)
    prompt = len(ids_of(files, path, "w9 w31 w8"))
    with caplog.at_level(logging.INFO, "lorafx.requests"):
        assert ask(server, "POST", path, model="tiny:a2", **body).status_code == 200
        ask(server, "GET", "/health")
    (line,) = [r.getMessage() for r in caplog.records if r.name == "lorafx.requests"]
    begin = rf"POST {path} 200 adapter=a2 tokens={prompt}\+6 "
    times = re.fullmatch(begin + r"first=(\d+\.\d{3}) s whole=(\d+\.\d{3}) s", line)
    assert times, line
    assert 0 < float(times[1]) <= float(times[2])


def test_lines_of_requests_that_are_refused(server, caplog):
    with caplog.at_level(logging.DEBUG, "lorafx.requests"):
        ask(server, "POST", ROUTES[1], model="tiny:zzz", prompt="w9")
        ask(server, "POST", ROUTES[1], model="tiny:a1", prompt="w9", max_tokens=-1)
        ask(server, "GET", "/a%0ab")
        ask(server, "GET", "/metrics")
    lines = [r.getMessage() for r in caplog.records if r.name == "lorafx.requests"]
    begins = [
        "POST /v1/completions 404 whole=",
        "POST /v1/completions 400 adapter=a1 tokens=0+0 whole=",
        "GET /a%0Ab 404 whole=",
        "GET /metrics 200 whole=",
    ]
    for line, begin in zip(lines, begins, strict=True):
        assert line.startswith(begin), line


def test_counts_under_the_names_of_vllm(files, server):
    before = samples(server)
    for stream in (False, True):
        body = question(ROUTES[1], "w9 w31 w8", 6, stream=stream)
        ask(server, "POST", ROUTES[1], model="tiny:a2", **body)
    ask(server, "POST", ROUTES[1], model="tiny:zzz", prompt="w9")
    after = samples(server)

    def grown(name, *labels):
        return after[name, labels] - before.get((name, labels), 0)

    prompt = len(files.tokenizer("w9 w31 w8")["input_ids"])
    assert grown("vllm:prompt_tokens_total") == 2 * prompt
    assert grown("vllm:generation_tokens_total") == 2 * 6
    assert grown("vllm:request_prompt_tokens_sum") == 2 * prompt
    assert grown("vllm:request_success_total", "length") == 2
    for name, count in {
        "time_to_first_token_seconds": 2,
        "e2e_request_latency_seconds": 2,
        "request_queue_time_seconds": 2,
        "request_prefill_time_seconds": 2,
        "request_decode_time_seconds": 2,
        "inter_token_latency_seconds": 2 * 5,
        "request_generation_tokens": 2,
    }.items():
        assert grown(f"vllm:{name}_count") == count, name
    parts = ("queue", "prefill", "decode")
    sums = sum(grown(f"vllm:request_{part}_time_seconds_sum") for part in parts)
    assert 0 < sums <= grown("vllm:e2e_request_latency_seconds_sum")


def test_what_is_running_and_waiting_by_adapter(server):
    async def look():
        async with client_of(server) as client:
            bodies = [
                {"model": name, **question(ROUTES[1], "w9", 4)} for name in ("tiny:a1", "tiny")
            ]
            tasks = [asyncio.create_task(client.post(ROUTES[1], json=body)) for body in bodies]
            await until(lambda: gate.steps)
            tasks.append(asyncio.create_task(client.post(ROUTES[1], json=bodies[0])))
            await until(lambda: sum(map(len, server.engine.sequences().values())) == 3)
            found = await asyncio.to_thread(samples, server)
            gate.open.set()
            await asyncio.gather(*tasks)
            return found

    with gated(server, free=0) as gate:
        found = asyncio.run(look())
    state = "lorafx_adapter_requests"
    running, waiting = (
        found["vllm:num_requests_running", ()],
        found["vllm:num_requests_waiting", ()],
    )
    assert running + waiting == 3
    assert waiting >= 1
    assert found[state, ("a1", "waiting")] >= 1
    assert sum(found.get((state, ("a1", s)), 0) for s in ("running", "waiting")) == 2
    assert found["vllm:kv_cache_usage_perc", ()] > 0
    (info,) = [labels for name, labels in found if name == "vllm:lora_requests_info"]
    assert info[0] == "3"
    assert "a1" in info[1:]
    places = [labels for name, labels in found if name == "lorafx_adapter_place"]
    assert sorted(adapter for adapter, _ in places) == [f"a{i}" for i in range(5)]
    assert {place for _, place in places} == {"banks", "host"}
    idle(server)
    after = samples(server)
    assert after["lorafx_adapter_place", ("a1", "banks")] == 1
    assert after["vllm:num_requests_running", ()] == after["vllm:num_requests_waiting", ()] == 0
    assert after["vllm:kv_cache_usage_perc", ()] == 0


@pytest.mark.quick
def test_the_number_of_labels_is_bounded():
    label = Labels(most=2)
    assert [label(name) for name in ("a", "b", "c", "a", "__base__", "d")] == [
        *("a", "b", OTHERS, "a", "__base__", OTHERS)
    ]
