"""A stream's pieces are together the text of the plain answer, and it ends as OpenAI's do."""

from __future__ import annotations

import asyncio
import json
import random
import re
import shutil
import socket
import subprocess
import threading

import pytest
import uvicorn
from served import anew, asgi, ask, events, gated, ids_of, plain, question, said
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from waiting import LONG, until

from lorafx.integrations.server.texts import Decoder

CHAT, COMPLETIONS, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"
#: Letters, and bytes that begin characters of two and three bytes, or go on with them. Each is a
#: token, from 7 on.
BYTES = [*b"abcdefgh", *range(0xC3, 0xD8), *range(0xE1, 0xE9), *range(0xAE, 0xC0)]


def byte_tokenizer(size: int) -> PreTrainedTokenizerFast:
    special = ["<pad>", "<s>", "</s>", *(f"<{i}>" for i in range(3, 7))]
    signs = map(chr, BYTES)  # ByteLevel has these bytes stand for themselves
    vocabulary = {name: i for i, name in enumerate([*special, *signs][:size])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        chat_template="{% for m in messages %}{{ m.content }}{% endfor %}",
    )


@pytest.fixture(scope="module")
def speaker(files, server):
    """The same model, whose tokens are parts of characters."""
    tokenizer = byte_tokenizer(files.case.base.config.vocab_size)
    return anew(server, files, tokenizer)


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS, RESPONSES, "/v1/messages"])
def test_a_stream_is_the_plain_answer(speaker, path):
    draw = random.Random(0)
    asked = [
        ("".join(draw.choices("abcdefgh", k=draw.randrange(2, 9))), draw.randrange(1, 12))
        for _ in range(12)
    ]

    def answer(words, new, **others):
        body = question(path, words, new, **others)
        answer = ask(speaker, "POST", path, model="tiny:a1", **body)
        assert answer.status_code == 200, answer.text
        return answer

    found = [
        (plain(path, answer(words, new).json()), answer(words, new, stream=True).text)
        for words, new in asked
    ]
    assert sum(whole.endswith("\ufffd") for whole, _ in found) > 3  # cut off within a character
    for whole, streamed in found:
        assert said(path, streamed) == whole
        ends = streamed.endswith("data: [DONE]\n\n")
        assert ends == (path in (CHAT, COMPLETIONS))  # the last events of others have names


@pytest.mark.quick
def test_bytes_that_are_no_text_do_not_end_a_stream():
    """tokenizers' own stream raises at some."""
    names = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁a", "b", "▁"]
    vocabulary = {name: i for i, name in enumerate(names)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], byte_fallback=True, unk_token="<unk>"))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )

    draw = random.Random(0)
    for _ in range(500):
        # Bytes that begin no character: one that was said cannot be taken back.
        tokens = [draw.choice([257, 258, 259, draw.randrange(129, 193)]) for _ in range(12)]
        decoder = Decoder(tokenizer)
        pieces = [decoder.step(token) for token in tokens]
        assert "".join([*pieces, decoder.end()]) == tokenizer.decode(tokens)


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_a_stream_begins_with_the_first_token(server, path):
    """Clients measure the time to it by the first chunk."""
    sent = []

    async def talk():
        async def send(message):
            sent.append(message.get("body", b""))

        body = {"model": "tiny:a1", **question(path, "w9 w12", 2, stream=True)}
        answering = asyncio.create_task(asgi(server, path, body, asyncio.Event().wait, send))
        await until(lambda: gate.steps)
        assert not any(sent)
        gate.open.set()
        await answering

    with gated(server, free=0) as gate:
        asyncio.run(talk())
    assert sum(map(len, sent))


def test_tokens_without_text_have_chunks(files, server):
    """As those that end an answer, where it is not to end."""
    bias = {"logit_bias": {str(files.tokenizer.eos_token_id): 100}, "ignore_eos": True}
    body = question(COMPLETIONS, "w9", 12, stream=True, temperature=0, **bias)
    found = events(ask(server, "POST", COMPLETIONS, model="tiny:a1", **body).text)
    assert [event["choices"][0]["text"] for event in found] == [""] * len(found)
    assert len(found) > 1


@pytest.fixture
def url(server):
    """Where the application is served over HTTP."""
    config = uvicorn.Config(server.app, log_level="warning")
    serving, listener = uvicorn.Server(config), socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=serving.run, args=([listener],))
    thread.start()
    yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    serving.should_exit = True
    thread.join(LONG)


def curl(url: str, **body) -> tuple[str, str]:
    """The headers and the body of an answer, as they come."""
    command = ["curl", "-sSNi", url, "-H", "Content-Type: application/json", "-d", json.dumps(body)]
    done = subprocess.run(command, capture_output=True, check=True, timeout=LONG)
    head, _, rest = done.stdout.decode().partition("\r\n\r\n")
    return head.lower(), rest


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_the_bytes_of_a_stream(files, url, path):
    """Of a single token, since it depends on time how many are in a chunk."""
    asked = question(path, "w9 w12", 1, stream=True, stream_options={"include_usage": True})
    head, text = curl(url + path, model="tiny:a1", **asked)
    assert head.startswith("http/1.1 200 ok\r\n")
    assert "\r\ncontent-type: text/event-stream; charset=utf-8\r\n" in head
    name = re.search("\r\nx-request-id: (.*)\r\n", head)[1]
    ids = ids_of(files, path, "w9 w12")
    word = files.text("a1", ids, 1)
    if path == CHAT:
        start = {"role": "assistant", "content": ""}
        first = [[{"index": 0, "delta": start, "finish_reason": None}]]
        answer, kind, name = (
            {"delta": {"content": word}},
            "chat.completion.chunk",
            f"chatcmpl-{name}",
        )
    else:
        first, answer, kind, name = [], {"text": word}, "text_completion", f"cmpl-{name}"
    ended = {"logprobs": None, "finish_reason": "length", "stop_reason": None}
    usage = {"prompt_tokens": len(ids), "completion_tokens": 1, "total_tokens": len(ids) + 1}
    created = int(re.search('"created": ([0-9]+)', text)[1])
    version = int(re.search('"adapter_version": ([0-9]+)', text)[1])
    common = {"id": name, "object": kind, "model": "tiny:a1", "created": created}
    common |= {"adapter_version": version, "weights_version": 0}
    chunks = [
        *({"choices": choices, "usage": None} for choices in first),
        {"choices": [{"index": 0, **answer, **ended}], "usage": None},
        {"choices": [], "usage": usage},
    ]
    wanted = [json.dumps({**common, **chunk}) for chunk in chunks]
    assert text == "".join(f"data: {event}\n\n" for event in [*wanted, "[DONE]"])


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_the_bytes_of_a_response(files, url):
    _, text = curl(
        url + RESPONSES, model="tiny:a1", **question(RESPONSES, "w9 w12", 1, stream=True)
    )
    found = events(text)
    lines = (f"event: {event['type']}\ndata: {json.dumps(event)}\n\n" for event in found)
    assert text == "".join(lines)
    assert [event["sequence_number"] for event in found] == list(range(len(found)))
    assert [event["type"] for event in found] == [
        *("response.created", "response.in_progress"),
        *("response.output_item.added", "response.content_part.added"),
        *("response.output_text.delta", "response.output_text.done"),
        "response.content_part.done",
        *("response.output_item.done", "response.incomplete"),
    ]
    word = files.text("a1", files.chat_ids("w9 w12"), 1)
    assert [event["delta"] for event in found if "delta" in event] == [word]
