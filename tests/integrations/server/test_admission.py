"""How many sequences are answered at once, how large they may be, and clients that are slow."""

from __future__ import annotations

import asyncio
import json
import time

import pytest
from served import anew, asgi, ask, client_of, gated, idle, plain, question, said
from waiting import LONG, until

PATH = "/v1/completions"
#: A limit of bodies, which is more than the requests here have.
BYTES = 400


@pytest.fixture(scope="module")
def narrow(files, server):
    """The same model in an application that answers two sequences at a time."""
    return anew(server, files, max_queue=2, max_body_bytes=BYTES)


def asking(adapter, words, new, **others):
    return {"model": f"tiny:{adapter}", **question(PATH, words, new, **others)}


def test_requests_past_the_queue_are_told_to_come_again(files, narrow):
    async def crowd():
        async with client_of(narrow) as client:
            asked = [client.post(PATH, json=asking(a, "w9 w12", 6)) for a in ("a1", "a2")]
            waiting = [asyncio.create_task(each) for each in asked]
            await until(lambda: len(narrow.engine._outputs.names) == 2)
            third = await client.post(PATH, json=asking("a3", "w9", 2))
            health = await client.get("/health")
            gate.open.set()
            return third, health, [await each for each in waiting]

    with gated(narrow, free=0) as gate:
        refused, health, answers = asyncio.run(crowd())
    assert refused.status_code == 429
    assert int(refused.headers["retry-after"]) >= 1
    assert refused.json()["error"]["code"] == "queue_full"
    assert health.status_code == 200
    ids = files.tokenizer("w9 w12")["input_ids"]
    for answer, adapter in zip(answers, ("a1", "a2"), strict=True):
        assert plain(PATH, answer.json()).strip() == files.text(adapter, ids, 6)
    assert ask(narrow, "POST", PATH, **asking("a3", "w9", 2)).status_code == 200
    assert '{adapter="__unknown__",status="429"} 1.0' in ask(narrow, "GET", "/metrics").text


def test_all_sequences_of_a_request_take_places(files, narrow):
    async def crowd():
        async with client_of(narrow) as client:
            both = asyncio.create_task(client.post(PATH, json=asking("a1", ["w9", "w12"], 2)))
            await until(lambda: gate.steps)
            third = await client.post(PATH, json=asking("a3", "w9", 2))
            gate.open.set()
            return third, await both

    with gated(narrow, free=0) as gate:
        refused, both = asyncio.run(crowd())
    assert (refused.status_code, len(both.json()["choices"])) == (429, 2)
    for words, n in ((["w9", "w12"], 2), ("w9", 3)):
        answer = ask(narrow, "POST", PATH, **asking("a1", words, 2, n=n, stream=True))
        assert answer.status_code == 400
        assert "--max-queue allows 2" in answer.json()["error"]["message"]
    idle(narrow)
    taken = [ask(narrow, "POST", PATH, **asking("a1", "w9", 2, n=2)) for _ in range(3)]
    assert [answer.status_code for answer in taken] == [200] * 3  # places come back


@pytest.mark.parametrize("path", [PATH, "/v1/load_lora_adapter"])
def test_bodies_that_are_too_large(narrow, path):
    """With their length in the headers, and in chunks without it."""
    fitting, read = json.dumps(asking("a1", "w9", 2)).encode(), []

    async def chunks(size):
        for start in range(0, size, 100):
            read.append(start)
            yield fitting[start : start + 100].ljust(min(100, size - start))

    async def send(content):
        headers = {"content-type": "application/json"}
        async with client_of(narrow) as client:
            return await client.post(path, content=content, headers=headers)

    for content in (fitting.ljust(BYTES + 1), chunks(100 * BYTES)):
        answer = asyncio.run(send(content))
        assert answer.status_code == 413
        assert str(BYTES) in answer.json()["error"]["message"]
    assert len(read) == BYTES // 100 + 1  # nothing more was read
    for content in (fitting.ljust(BYTES), chunks(BYTES)):
        assert asyncio.run(send(content)).status_code == (200 if path == PATH else 403)


def test_a_reader_that_is_slow_keeps_nobody_waiting(files, server):
    """It gets no piece for as long as it takes others to be answered, and then its whole answer."""

    async def talk():
        ready, others_done = asyncio.Event(), asyncio.Event()
        pieces = []

        async def send(message):
            if message.get("body"):
                ready.set()
                await others_done.wait()
                pieces.append(message["body"])

        async def forever():
            await asyncio.get_running_loop().create_future()

        body = asking("a1", "w9 w12", 30, stream=True)
        slow = asyncio.create_task(asgi(server, PATH, body, forever, send))
        await asyncio.wait_for(ready.wait(), LONG)
        async with client_of(server) as client:
            asked = (client.post(PATH, json=asking("a2", "w9", 20)) for _ in range(3))
            answers = await asyncio.gather(*asked)
        assert not pieces
        others_done.set()
        await slow
        return answers, b"".join(pieces).decode()

    answers, text = asyncio.run(talk())
    ids = files.tokenizer("w9")["input_ids"]
    for answer in answers:
        assert plain(PATH, answer.json()).strip() == files.text("a2", ids, 20)
    ids = files.tokenizer("w9 w12")["input_ids"]
    assert said(PATH, text).strip() == files.text("a1", ids, 30)


def test_a_client_that_goes_away_within_its_body(server):
    """Nothing is answered, and no request is left."""

    async def leave():
        coming = [{"type": "http.request", "body": b"{", "more_body": True}]

        async def receive():
            return coming.pop() if coming else {"type": "http.disconnect"}

        async def send(message):
            raise AssertionError(message)

        headers = [(b"content-type", b"application/json")]
        scope = {"type": "http", "method": "POST", "path": PATH, "headers": headers}
        await server.app(scope, receive, send)

    asyncio.run(leave())
    assert "lorafx_requests_running 0.0" in ask(server, "GET", "/metrics").text


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_at_once(server, stream):
    """Its request is cancelled before its answer begins."""

    async def receive():
        return {"type": "http.disconnect"}

    async def send(message):
        assert not message.get("body")

    with gated(server, free=0) as gate:
        asyncio.run(asgi(server, PATH, asking("a1", "w9", 40, stream=stream), receive, send))
        gate.open.set()
        idle(server)
        assert gate.steps <= 2
    assert server.engine.cache_usage() == 0
    assert not server.engine.output_router.result_handlers


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_a_long_prompt_keeps_nobody_waiting(server, path):
    body = {"model": "tiny", **question(path, "w9 " * 400_000, 2)}

    async def ask_beside():
        async with client_of(server) as client:
            asked = asyncio.create_task(client.post(path, json=body))
            begun = time.thread_time(), time.process_time()
            answer = await asked
            return answer, time.thread_time() - begun[0], time.process_time() - begun[1]

    # By CPU time: that of the loop's thread, in which all others are answered.
    answer, of_loop, whole = asyncio.run(ask_beside())
    assert answer.json()["error"]["code"] == "context_length_exceeded"
    assert of_loop < whole / 2
