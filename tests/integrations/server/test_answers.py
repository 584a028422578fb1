"""What the server answers is what dense merge generates, whoever else is asking."""

from __future__ import annotations

import asyncio
import re

import openai
import pytest
from served import asgi, ask, client_of, gated, idle, ids_of, prompts, question, said, serving
from waiting import LONG, until

pytestmark = pytest.mark.any_sizes

ROUTES = ("/v1/chat/completions", "/v1/completions", "/v1/responses")


@pytest.fixture(scope="module")
def server(files):
    """With graphs, and fewer slots than adapters."""
    with serving(files, graphs=True, max_adapters=3) as server:
        yield server


def test_sixteen_streams_at_once(files, server):
    adapters = [None, "a0", "a1", "a2", "a3"]
    work = [
        (ROUTES[i % 3], adapters[i % 5], words, 1 + (5 * i) % 13)
        for i, words in enumerate(prompts(16, seed=1))
    ]

    async def stream(client, path, adapter, words, new):
        name = "tiny" if adapter is None else f"tiny:{adapter}"
        body = {"model": name, **question(path, words, new, stream=True)}
        # Clients may name their requests, and alike.
        answer = await client.post(path, json=body, headers={"x-request-id": "mine"})
        assert answer.status_code == 200, answer.text
        return answer.text

    async def all_at_once(work):
        async with client_of(server) as client:
            return await asyncio.wait_for(
                asyncio.gather(*(stream(client, *one) for one in work)), timeout=LONG
            )

    graphs = server.compiled.recompiles
    texts = asyncio.run(all_at_once(work))
    different = 0
    for (path, adapter, words, new), text in zip(work, texts, strict=True):
        ids = ids_of(files, path, words)
        want = files.text(adapter, ids, new)
        assert said(path, text).strip() == want, (path, adapter)
        different += want != files.text(None, ids, new)
    assert different >= 8  # the base's answers would not do
    assert server.compiled.recompiles == graphs
    assert server.compiled.stats().evictions > 0


#: What clients of OpenAI and of vLLM send without asking for anything.
NOTHING = {
    **{"n": 1, "top_p": 1, "top_k": 0, "min_p": 0.0, "presence_penalty": 0, "seed": 7},
    **{"frequency_penalty": 0.0, "repetition_penalty": 1.0, "stop": None, "logit_bias": None},
    **{"logprobs": None, "best_of": None, "echo": False, "ignore_eos": False, "stop_token_ids": []},
    **{"min_tokens": 0, "skip_special_tokens": True, "user": "me", "guided_json": None},
}


@pytest.mark.parametrize("path", ROUTES)
@pytest.mark.parametrize(
    "asked",
    [{"temperature": 0, **NOTHING}, {**NOTHING}, {"temperature": 5.0, "top_k": 1}],
    ids=["neutral", "without temperature", "top_k of one"],
)
def test_fields_that_ask_for_nothing(files, server, path, asked):
    body = question(path, "w9 w31 w8", 6, stream=True, **asked)
    if path == "/v1/responses":
        body = {name: value for name, value in body.items() if name not in ("echo", "user")}
    answer = ask(server, "POST", path, model="tiny:a2", **body)
    assert answer.status_code == 200, answer.text
    want = files.text("a2", ids_of(files, path, "w9 w31 w8"), 6)
    assert said(path, answer.text).strip() == want


def test_long_answers_end_where_the_positions_do(files, server):
    room, path = files.case.base.config.max_position_embeddings, "/v1/completions"
    long = ask(server, "POST", path, model="tiny:a0", prompt="w9 w10", max_tokens=2 * room).json()
    assert long["usage"]["total_tokens"] <= room
    assert long["usage"]["total_tokens"] < room or long["choices"][0]["finish_reason"] == "length"
    answer = ask(server, "POST", path, model="tiny:a0", prompt="w9 " * room)
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "context_length_exceeded"


def test_the_client_of_openai(files, server):
    async def talk():
        async with client_of(server) as http:
            client = openai.AsyncOpenAI(base_url="http://test/v1", api_key="none", http_client=http)
            stream = await client.completions.create(
                model="tiny:a3", prompt="w9 w31", max_tokens=7, stream=True
            )
            text = "".join([chunk.choices[0].text async for chunk in stream])
            answer = await client.responses.create(
                model="tiny:a3", input="w9 w31", max_output_tokens=7
            )
            with pytest.raises(openai.NotFoundError, match="nearest: tiny:a"):
                await client.completions.create(model="tiny:a7", prompt="w9")
            models = [model.id async for model in client.models.list()]
            return text, answer.output_text, models

    text, answered, models = asyncio.run(talk())
    assert text.strip() == files.text("a3", files.tokenizer("w9 w31")["input_ids"], 7)
    assert answered.strip() == files.text("a3", files.chat_ids("w9 w31"), 7)
    assert "tiny:a3" in models


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away(server, stream):
    """Its request is cancelled, and nothing of it is left, after at most one step."""
    path = "/v1/completions"
    body = {"model": "tiny:a1", **question(path, "w9 w12 w13 w14 w15", 40, stream=stream)}

    async def leave():
        went = asyncio.Event()

        async def receive():
            await went.wait()
            return {"type": "http.disconnect"}

        async def send(message):
            pieces.append(message.get("body"))

        async def watch():
            await until(lambda: gate.steps > gate.free and any(pieces) == stream)
            assert server.engine.cache_usage() > 0
            went.set()

        await asyncio.gather(asgi(server, path, body, receive, send), watch())
        async with client_of(server) as client:
            return (await client.get("/metrics")).text

    pieces = []
    before = asked(ask(server, "GET", "/metrics").text)
    with gated(server, free=3) as gate:
        after = asyncio.run(leave())
        assert asked(after) == before + 1
        assert "lorafx_requests_running 0.0" in after
        assert not server.engine.output_router.result_handlers
        steps = gate.steps
        gate.open.set()
        idle(server)
        assert gate.steps <= steps + 1
    assert server.engine.cache_usage() == 0


def asked(metrics):
    """The number of requests for a1 whose clients went away."""
    found = re.search('lorafx_requests_total{adapter="a1",status="499"} (.*)', metrics)
    return 0 if found is None else float(found[1])
