"""Requests that are refused, in OpenAI's form, and what the server counts."""

from __future__ import annotations

import asyncio
import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from served import anew, ask, client_of, question, said

from lorafx.errors import CaptureError

CHAT = "/v1/chat/completions"
PATHS = (CHAT, "/v1/completions", "/v1/responses")


def test_models(files, server):
    """Each once. Who asks for one by its other name gets it by that."""
    listed = ask(server, "GET", "/v1/models").json()["data"]
    assert listed == ask(server, "GET", "/v1/models/").json()["data"]
    roots = {"tiny": files.model, **{f"tiny:a{i}": files.adapters / f"a{i}" for i in range(5)}}
    assert [(entry["id"], entry["root"]) for entry in listed] == [
        (name, str(root)) for name, root in roots.items()
    ]
    room = files.case.base.config.max_position_embeddings
    for entry in listed:
        assert entry["parent"] == (None if entry["id"] == "tiny" else "tiny")
        assert entry["max_model_len"] == room
        assert ask(server, "GET", f"/v1/models/{entry['id']}").json() == entry
    assert ask(server, "GET", "/v1/models/a2").json() == {**listed[3], "id": "a2"}
    assert ask(server, "GET", "/v1/models/zz").status_code == 404


@pytest.mark.parametrize(
    ("path", "nearest"),
    [
        ("/chat/completions", "nearest: /v1/chat/completions;"),
        ("/v1/chat", "nearest: /v1/chat/completions;"),
        ("/api/chat", "nearest: /v1/chat/completions;"),
        ("/generate", "nearest: /v1/completions;"),
        ("/v1/complitions", "nearest: /v1/completions,"),
        ("/models", "nearest: /v1/models;"),
        ("/v1/embeddings", "this server's model generates, and /v1/embeddings is of those"),
        ("/other", "'/other'; GET /docs"),
        (f"/{'x' * 9999}", "there is no route '/xxx"),
    ],
)
def test_a_path_that_is_none_names_the_nearest(server, path, nearest):
    answer = ask(server, "POST", path, model="tiny")
    assert answer.status_code == 404
    error = answer.json()["error"]
    assert (error["type"], nearest in error["message"]) == ("invalid_request_error", True), error
    assert len(error["message"]) < 300


@pytest.mark.parametrize("key", [None, "secret"])
def test_the_description_of_the_routes(files, server, key):
    """It has their fields, and with each answer in these tests the status is looked for in it."""
    described = ask(anew(server, files, api_key=key), "GET", "/openapi.json", key=f"Bearer {key}")
    paths = described.json()["paths"]

    def fields(path):
        body = paths[path]["post"]["requestBody"]["content"]["application/json"]["schema"]
        return body["properties"], body["required"]

    for path, prompt in zip(PATHS, ("messages", "prompt", "input"), strict=True):
        found, required = fields(path)
        assert {"model", "stream", "temperature", "seed", prompt} <= found.keys()
        assert set(required) == {"model", prompt}
        assert found["stream"]["type"] == "boolean"
    assert "max_output_tokens" in fields(PATHS[2])[0]
    every = [op["responses"] for path, ops in paths.items() for op in ops.values()]
    assert not any("422" in statuses for statuses in every)
    assert ("401" in paths["/v1/models"]["get"]["responses"]) == (key is not None)
    assert "401" not in paths["/health"]["get"]["responses"]
    refused = paths["/v1/models/{name}"]["get"]["responses"]["404"]["content"]
    assert refused["application/json"]["schema"]["$ref"].endswith("/ErrorAnswer")


@pytest.mark.parametrize("path", [CHAT, "/v1/completions", "/v1/responses"])
@pytest.mark.parametrize(
    "name", ["tiny:a9", "a9", "other:a1", "tini", "tiny:__base__", "tiny:", "tiny:a1.gguf"]
)
def test_unknown_names_are_404_and_name_the_nearest(server, path, name):
    answer = ask(server, "POST", path, model=name, **question(path, "w9", 2))
    assert answer.status_code == 404
    error = answer.json()["error"]
    assert error["code"] == "model_not_found"
    assert repr(name) in error["message"]
    assert "tiny" in error["message"]
    if name in ("tiny:a9", "other:a1"):
        assert "nearest: tiny:a" in error["message"]


@pytest.mark.parametrize(
    ("body", "word"),
    [
        ({}, "model"),
        ({"model": 3}, "model"),
        ({"model": "tiny", "messages": []}, "list of messages"),
        ({"model": "tiny", "messages": None}, "`messages` is missing"),
        ({"model": "tiny", "messages": [{"content": "w9"}]}, "role"),
        (
            {
                "model": "tiny",
                "messages": [
                    {"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}
                ],
            },
            "image_url",
        ),
        ({"model": "tiny", "messages": [{"role": "tool", "content": "w9"}]}, "no tools here"),
        (
            {
                "model": "tiny",
                "messages": [{"role": "assistant", "tool_calls": [{"function": {}}]}],
            },
            "tool_calls",
        ),
        (
            {"model": "tiny", "messages": [{"role": "assistant", "tool_calls": ["w9"]}]},
            "tool_calls",
        ),
    ],
)
def test_messages_that_are_none(server, body, word):
    answer = ask(server, "POST", CHAT, **body)
    assert answer.status_code == 400, answer.text
    assert re.search(word, answer.json()["error"]["message"])


#: Values that are none of their fields', or are not served: the routes that know the field, the
#: value, and a part of the message.
REFUSED = [
    (PATHS, "temperature", 10**400, "a number from 0"),
    (PATHS, "temperature", "hot", "a number from 0"),
    (PATHS, "top_k", 1.5, "an integer"),
    (PATHS, "top_p", 2, "from 0 to 1"),
    (PATHS, "min_p", -0.1, "from 0 to 1"),
    (PATHS, "presence_penalty", 3, "from -2 to 2"),
    (PATHS, "repetition_penalty", 0, "repetition_penalty"),
    (PATHS, "seed", "x", "an integer"),
    (PATHS, "bad_words", ["w9", 3], "strings"),
    (PATHS, "bad_words", ["w9"] * 1025, "at most 1024"),
    (PATHS, "logit_bias", {"w9": 3}, "valid integer"),
    (PATHS, "logit_bias", {"99999": 3}, "logit_bias"),
    (PATHS, "logit_bias", {"9": 1000}, "logit_bias"),
    (PATHS, "stream", "yes", "valid boolean"),
    (PATHS[::2], "tools", ["get_weather"], "an object"),
    (PATHS[::2], "tools", [{"type": "function", "name": "f"}], "response template"),
    (PATHS[::2], "tools", [{"type": "function"}], "functions with a name"),
    (PATHS[::2], "tools", [{"type": "web_search"}], "describe it as a function"),
    (PATHS[2:], "tools", [{"type": "mcp", "server_url": "x"}], "describe it as a function"),
    (PATHS[1:2], "tools", [{"type": "function"}], "leave it out, or send []"),
    (PATHS, "suffix", "w9", "not served"),
    (PATHS[::2], "reasoning_effort", 3, "'minimal', 'low'"),
    (PATHS[::2], "reasoning_effort", "very", "'minimal', 'low'"),
    (PATHS[::2], "reasoning", {"effort": True}, "'minimal', 'low'"),
    (PATHS[::2], "reasoning", {"summary": "detailed"}, "'auto'"),
    (PATHS[::2], "reasoning", {"max_tokens": 9}, "not permitted"),
    (PATHS[1:2], "reasoning_effort", "high", "leave it out"),
    (PATHS[1:2], "reasoning", {"effort": "high"}, "leave it out"),
    (PATHS, "thinking_token_budget", 9, "max_tokens"),
    (PATHS, "repetition_detection", {"max_pattern_size": 3}, "repetition_penalty"),
    (PATHS, "logprob_token_ids", [3], "top_logprobs"),
    (PATHS, "enable_thinking", False, "chat_template_kwargs"),
    (PATHS, "return_token_offsets", True, "or send False"),
    (PATHS, "truncation_side", "left", "not served"),
    (PATHS, "regex", "w9", "structured_outputs"),
    (PATHS, "use_beam_search", True, "or send False"),
    (PATHS, "allowed_token_ids", [], "leave it out"),
    (PATHS, "allowed_token_ids", [99999], "tokens 0 to"),
    (PATHS, "allowed_token_ids", [*range(1025)], "--max-items"),
    (PATHS, "truncate_prompt_tokens", -2, "greater than or equal to -1"),
    (PATHS, "truncate_prompt_tokens", "3", "valid integer"),
    (PATHS, "guided_json", {}, "structured_outputs"),
    (PATHS[:2], "n", 0, "greater than or equal to 1"),
    (PATHS[:2], "n", True, "valid integer"),
    (PATHS[:2], "best_of", 2, "the value of `n`"),
    (PATHS[:2], "stop", [3], "valid string"),
    (PATHS[:2], "stop_token_ids", [99999], "stop_token_ids"),
    (PATHS[:2], "stop_token_ids", "w9", "valid array"),
    (PATHS[:2], "max_tokens", "7", "valid integer"),
    (PATHS[:2], "max_tokens", 0, "max_tokens"),
    (PATHS[:2], "max_tokens", -1, "max_tokens"),
    (PATHS[:2], "prompt_logprobs", 21, "at most 20"),
    (PATHS[:2], "stream_options", {"include_usage": True}, "stream"),
    (PATHS[:2], "response_format", {"type": "yaml"}, "json_schema"),
    (PATHS[:2], "response_format", "json_object", "an object"),
    (PATHS[:2], "structured_outputs", {"structural_tag": "x"}, "structural_tag"),
    (PATHS[1:2], "logprobs", 21, "at most 20"),
    (PATHS[1:2], "logprobs", True, "valid integer"),
    (PATHS[:1], "logprobs", 3, "valid boolean"),
    (PATHS[:1], "top_logprobs", 2, "`logprobs`"),
    (PATHS[:1], "echo", True, "not served"),
    (PATHS[::2], "tool_choice", "required", "among `tools`"),
    (PATHS[::2], "tool_choice", "any", "'auto', 'none' or 'required'"),
    (PATHS[::2], "tool_choice", {"type": "function", "name": "f"}, "['f'] among `tools`"),
    (PATHS[::2], "tool_choice", {"type": "web_search"}, "a function by its name"),
    (PATHS[::2], "tool_choice", {"type": "allowed_tools", "tools": []}, "with their mode"),
    (PATHS[::2], "tool_choice", {"type": "allowed_tools", "mode": "auto", "tools": [3]}, "mode"),
    (PATHS[:1], "chat_template_kwargs", {"tokenize": False}, "chat_template_kwargs"),
    (PATHS[:1], "chat_template_kwargs", {"messages": []}, "template's own"),
    (PATHS[2:], "n", 2, "or send 1"),
    (PATHS[2:], "stop", ["w9"], "not served"),
    (PATHS[2:], "logprobs", 1, "not served"),
    (PATHS[2:], "previous_response_id", "x", "not served"),
]


@pytest.mark.parametrize(
    ("path", "field", "value", "word"),
    [(path, *case) for paths, *case in REFUSED for path in paths],
)
def test_fields_that_are_refused_by_name(server, path, field, value, word):
    for stream in (False, True) if field != "stream" and field != "stream_options" else (False,):
        body = {**question(path, "w9", 2), "stream": stream, field: value}
        answer = ask(server, "POST", path, model="tiny", **body)
        assert answer.status_code == 400, answer.text
        error = answer.json()["error"]
        assert error["param"] == field
        assert field in error["message"]
        assert word in error["message"]
    assert not server.engine.output_router.result_handlers


NAMES = sorted({field for _, field, *_ in REFUSED} | {"prompt", "input", "echo", "text", "model"})
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["type", "json", "9", "x"]), inner, max_size=3)
    ),
    max_leaves=5,
)


@settings(max_examples=300)
@given(st.sampled_from(PATHS), st.dictionaries(st.sampled_from(NAMES), VALUES, max_size=2))
def test_any_value_is_answered_or_refused(server, path, fields):
    answer = ask(server, "POST", path, **{"model": "tiny", **question(path, "w9", 1), **fields})
    assert answer.status_code in (200, 400, 404), answer.text


@pytest.mark.parametrize("path", PATHS)
def test_half_of_a_pair(server, path):
    body = {"model": "tiny", **question(path, "w9 \ud800", 2)}
    answer = ask(server, "POST", path, **body)
    assert answer.status_code == 400, answer.text
    assert "surrogate" in answer.json()["error"]["message"]
    assert ask(server, "POST", path, **{**body, "model": "\ud800"}).status_code == 404


@pytest.mark.parametrize("depth", [300, 5_000])
@pytest.mark.parametrize("path", PATHS)
def test_lists_within_lists(server, path, depth):
    fields = json.dumps({"model": "tiny", **question(path, "w9", 2)})
    body = f'{fields[:-1]}, "metadata": {"[" * depth}{"]" * depth}}}'

    async def send():
        async with client_of(server) as client:
            headers = {"content-type": "application/json"}
            return await client.post(path, content=body, headers=headers)

    answer = asyncio.run(send())
    assert answer.status_code == 400, answer.text
    assert "body" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (b'{"model": ', "Expecting value, at character 10"),
        (b"[1]", "it is [1]"),
        (b"", "it is empty"),
        (b"null", "it is empty"),
    ],
)
@pytest.mark.parametrize("path", [CHAT, "/v1/load_lora_adapter"])
def test_a_body_that_is_no_object_says_nothing_of_the_servers_files(server, path, content, word):
    async def send():
        async with client_of(server) as client:
            headers = {"content-type": "application/json"}
            return await client.post(path, content=content, headers=headers)

    answer = asyncio.run(send())
    assert answer.status_code == 400
    message = answer.json()["error"]["message"]
    assert message == f"the body is not a JSON object: {word}"


@pytest.mark.parametrize("path", ["/reset", "/load_model", "/v1/systemone"])
def test_routes_that_would_change_the_model_are_not_there(server, path):
    answer = ask(server, "POST", path, model="tiny")
    assert answer.status_code == 404
    assert answer.json()["error"]["message"]


def test_loading_is_off_unless_it_is_switched_on(server, files):
    path = str(files.adapters / "a0")
    for route in ("/v1/load_lora_adapter", "/v1/unload_lora_adapter"):
        answer = ask(server, "POST", route, lora_name="a0", lora_path=path)
        assert answer.status_code == 403
        assert "--allow-runtime-loading" in answer.json()["error"]["message"]
    assert len(server.compiled.adapters) == 5


def test_health_and_metrics(server):
    assert ask(server, "GET", "/health").json() == {"status": "ok"}
    before = counts(server)
    for _ in range(2):
        ask(server, "POST", CHAT, model="tiny:a1", **question(CHAT, "w9 w10", 3))
    ask(server, "POST", CHAT, model="tiny:a1", **question(CHAT, "w9 w10", 3, stream=True))
    ask(server, "POST", CHAT, model="tiny", **question(CHAT, "w9", 2, suffix="w9"))
    ask(server, "POST", CHAT, model="tiny:zzz", **question(CHAT, "w9", 2))
    after = counts(server)

    def grown(key: str) -> float:
        return after[key] - before.get(key, 0)

    assert grown('lorafx_requests_total{adapter="a1",status="200"}') == 3
    assert grown('lorafx_requests_total{adapter="__base__",status="400"}') == 1
    assert grown('lorafx_requests_total{adapter="__unknown__",status="404"}') == 1
    assert grown('lorafx_tokens_total{adapter="a1"}') >= 3 * (5 + 2) - 8  # some may be shared
    assert after["lorafx_requests_running"] == 0
    assert after["lorafx_adapter_loads_total"] >= 1
    assert {"lorafx_adapter_hits_total", "lorafx_adapter_evictions_total"} <= after.keys()
    assert "lorafx_adapter_waits_total" in after
    for place, nbytes in server.compiled.stats().nbytes.items():
        assert after[f'lorafx_adapter_bytes{{place="{place}"}}'] == nbytes > 0
    assert after['lorafx_place_hits_total{place="host"}'] >= 1
    assert after['lorafx_place_misses_total{place="disk"}'] == 0
    assert not any("zzz" in key for key in after)


def counts(server) -> dict[str, float]:
    answer = ask(server, "GET", "/metrics")
    assert answer.headers["content-type"].startswith("text/plain")
    rows = re.findall(r"^(lorafx\S+) (\S+)$", answer.text, re.MULTILINE)
    return {key: float(value) for key, value in rows}


@pytest.mark.parametrize("error", [CaptureError, RuntimeError])  # lorafx's, the model's own
def test_requests_fail_alone(server, monkeypatch, error):
    """An error of one step is the answer of the requests in it; later ones are served."""
    forward = server.engine._forward
    failures = 'lorafx_failures_total{adapter="a1"}'
    before = counts(server).get(failures, 0)

    def broken(**_):
        raise error('the "model" cannot be captured')

    monkeypatch.setattr(server.engine, "_forward", broken)
    answer = ask(server, "POST", CHAT, model="tiny:a1", **question(CHAT, "w9", 2))
    assert answer.status_code == 500
    assert 'the "model" cannot' in answer.json()["error"]["message"]
    streamed = ask(server, "POST", CHAT, model="tiny:a1", **question(CHAT, "w9", 2, stream=True))
    with pytest.raises(AssertionError, match="cannot be captured"):
        said(CHAT, streamed.text)
    assert streamed.text.endswith("data: [DONE]\n\n")
    monkeypatch.setattr(server.engine, "_forward", forward)
    assert counts(server)[failures] == before + 2
    assert ask(server, "POST", CHAT, model="tiny:a1", **question(CHAT, "w9", 2)).status_code == 200
    assert ask(server, "GET", "/health").status_code == 200


def test_a_model_that_fails_in_every_step(server, monkeypatch):
    """Five steps in a row without one that succeeds; then one does."""
    forward = server.engine._forward
    failed = "lorafx_failed_steps_total"
    before = counts(server)[failed]

    def broken(**_):
        raise IndexError("said by a prompt")

    def step():
        return ask(server, "POST", CHAT, model="tiny:a1", **question(CHAT, "w9", 2)).status_code

    monkeypatch.setattr(server.engine, "_forward", broken)
    assert [step() for _ in range(4)] == [500] * 4
    assert ask(server, "GET", "/health").status_code == 200
    monkeypatch.setattr(server.engine, "_forward", forward)
    assert step() == 200
    monkeypatch.setattr(server.engine, "_forward", broken)
    assert [step() for _ in range(5)] == [500] * 5
    health = ask(server, "GET", "/health")
    assert health.status_code == 503
    assert "The last 5 steps of the engine failed" in health.json()["reason"]
    assert "IndexError" in health.json()["reason"]
    assert "prompt" not in health.text
    assert counts(server)[failed] == before + 9
    monkeypatch.setattr(server.engine, "_forward", forward)
    assert step() == 200
    assert ask(server, "GET", "/health").json() == {"status": "ok"}


def test_an_engine_that_has_failed(server, monkeypatch):
    status = server.engine.background_thread_status
    monkeypatch.setattr(status, "fatal_error", RuntimeError("out of memory"))
    assert ask(server, "GET", "/health").status_code == 503
    for stream in (False, True):
        answer = ask(server, "POST", CHAT, model="tiny", **question(CHAT, "w9", 2, stream=stream))
        assert answer.status_code == 503
        assert "out of memory" in answer.json()["error"]["message"]
