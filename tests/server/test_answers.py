"""What the server answers is what dense merge generates, whoever else is asking."""

from __future__ import annotations

import asyncio
import random

import pytest
from served import client_of, question, said

ROUTES = ("/v1/chat/completions", "/v1/completions", "/v1/responses")


def prompts(count: int, seed: int) -> list[str]:
    draw = random.Random(seed)
    return [
        " ".join(f"w{draw.randrange(7, 61)}" for _ in range(draw.randrange(1, 12)))
        for _ in range(count)
    ]


def test_sixteen_streams_at_once(files, server):
    adapters = [None, "a0", "a1", "a2", "a3"]
    work = [
        (ROUTES[i % 3], adapters[i % 5], words, 1 + (5 * i) % 13)
        for i, words in enumerate(prompts(16, seed=1))
    ]

    async def ask(client, path, adapter, words, new):
        name = "tiny" if adapter is None else f"tiny:{adapter}"
        body = {"model": name, **question(path, words, new, stream=True)}
        # Clients may name their requests, and alike.
        answer = await client.post(path, json=body, headers={"x-request-id": "mine"})
        assert answer.status_code == 200, answer.text
        return answer.text

    async def all_at_once():
        async with client_of(server) as client:
            return await asyncio.gather(*(ask(client, *one) for one in work))

    graphs = server.compiled.recompiles
    texts = asyncio.run(all_at_once())
    different = 0
    for (path, adapter, words, new), text in zip(work, texts, strict=True):
        ids = (
            files.tokenizer(words)["input_ids"]
            if path == "/v1/completions"
            else files.chat_ids(words)
        )
        want = files.text(adapter, ids, new)
        assert said(path, text).strip() == want, (path, adapter)
        different += want != files.text(None, ids, new)
    assert different >= 8  # the base's answers would not do
    assert server.compiled.recompiles == graphs
    assert server.compiled.stats().evictions > 0


@pytest.mark.parametrize("path", ROUTES)
def test_answers_without_a_stream(files, server, path):
    async def ask():
        async with client_of(server) as client:
            body = {"model": "tiny:a2", **question(path, "w9 w31 w8", 6)}
            return await client.post(path, json=body)

    answer = asyncio.run(ask()).json()
    if path == "/v1/completions":
        got, ids = answer["choices"][0]["text"], files.tokenizer("w9 w31 w8")["input_ids"]
    elif path == "/v1/responses":
        got, ids = answer["output"][0]["content"][0]["text"], files.chat_ids("w9 w31 w8")
    else:
        got, ids = answer["choices"][0]["message"]["content"], files.chat_ids("w9 w31 w8")
    assert got.strip() == files.text("a2", ids, 6)
    assert answer["model"] == "tiny:a2"


def test_long_answers_end_where_the_positions_do(files, server):
    async def ask(words):
        async with client_of(server) as client:
            body = {"model": "tiny:a0", "prompt": words}
            return await client.post("/v1/completions", json=body)

    room = files.case.base.config.max_position_embeddings
    usage = asyncio.run(ask("w9 w10")).json()["usage"]
    assert usage["total_tokens"] <= room
    answer = asyncio.run(ask("w9 " * room))
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "context_length_exceeded"
