"""A tiny Llama on disk with a tokenizer and adapters, served; what it has to answer."""

from __future__ import annotations

import asyncio
import json
import random
import socket
import threading
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import pytest
import torch
from dense_merge import Case, build_case
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast
from waiting import LONG, wait_until

from lorafx.integrations.server.generating import GeneratingModel
from lorafx.integrations.server.routes import build_app
from lorafx.integrations.server.run import Opened, opened
from lorafx.integrations.server.settings import Settings
from lorafx.runtime.beside.compilers import Compilers

#: Sizes of the engine that make chunks and pages small.
SMALL = {"page_size": 4, "num_blocks": 256, "max_batch_tokens": 48, "lowering": "reference"}
WORDS = ["<pad>", "<s>", "</s>", "<unk>", "user", "assistant", "system"]
TEMPLATE = (
    "{% for m in messages %}"
    "{% if m.role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    "{{ m.role }} {{ m.content }} {% endfor %}"
    "{% if add_generation_prompt %}assistant{% endif %}"
)


def word_tokenizer(size: int) -> PreTrainedTokenizerFast:
    """Each word is a token: the roles, and w7, w8, ... Prompts begin with <s>."""
    words = {
        word: i for i, word in enumerate([*WORDS, *(f"w{i}" for i in range(len(WORDS), size))])
    }
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        chat_template=TEMPLATE,
    )


@dataclass
class Files:
    """A model `tiny` and adapters a0 to a4 on disk."""

    case: Case
    tokenizer: PreTrainedTokenizerFast
    model: Path
    adapters: Path

    def text(self, adapter: str | None, ids: list[int], new: int) -> str:
        """What the base with `adapter` merged into it goes on with, greedily."""
        model: Any = self.case.alone(adapter)
        prompt = torch.tensor([ids])
        tokens = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=new,
            do_sample=False,
            pad_token_id=0,
        )
        said = self.tokenizer.decode(tokens[0, len(ids) :], skip_special_tokens=True)
        assert isinstance(said, str)
        return said

    def chat_ids(self, words: str) -> list[int]:
        """The prompt of one message of the user's."""
        message = [{"role": "user", "content": words}]
        return list(
            self.tokenizer.apply_chat_template(message, add_generation_prompt=True)["input_ids"]
        )


def write_files(folder: Path, **changes: Any) -> Files:
    """`changes` are of the model's configuration."""
    case = build_case("llama", folder / "adapters", **changes)
    base: Any = case.base
    tokenizer = word_tokenizer(base.config.vocab_size)
    base.save_pretrained(folder / "tiny")
    tokenizer.save_pretrained(folder / "tiny")
    return Files(case, tokenizer, folder / "tiny", folder / "adapters")


@contextmanager
def serving(files: Files, *, graphs: bool = False, **settings: Any) -> Iterator[Opened]:
    """Requests are answered in eager mode unless there are to be `graphs`, which take ten seconds a
    server."""
    given = Settings(**{"model": str(files.model), **SMALL, "adapters": files.adapters, **settings})
    with ExitStack() as opening:
        with pytest.MonkeyPatch.context() as patch:
            if not graphs:
                patch.setenv("LORAFX_START", "eager")
                patch.setattr(Compilers, "consider", lambda *_: False)
            server = opening.enter_context(opened(given))
            if not graphs:
                server.compiled._entries.tiers.compilers.consider = lambda *_: False
        yield server


def anew(
    server: Opened, files: Files, tokenizer: PreTrainedTokenizerFast | None = None, **settings: Any
) -> Opened:
    """The same model and engine in an application of its own."""
    given = {"model": str(files.model), "adapters": files.adapters, **settings}
    tokenizer = tokenizer or files.tokenizer
    served = GeneratingModel(server.compiled, server.engine, tokenizer, Settings(**given))
    return server._replace(app=build_app(served))


@asynccontextmanager
async def client_of(server: Opened) -> AsyncIterator[httpx2.AsyncClient]:
    """An HTTP client of the application, without a network."""
    transport = httpx2.ASGITransport(app=server.app)
    async with httpx2.AsyncClient(transport=transport, base_url="http://test") as client:
        yield client


def ask(server: Opened, method: str, path: str, *, key: str | None = None, **body: Any) -> Any:
    """The answer to one request, in ASCII, in which it may hold half of a surrogate pair. Its
    status is one that the application describes for the route."""

    async def once() -> Any:
        headers = {"content-type": "application/json"}
        if key is not None:
            headers["Authorization"] = key
        content = None if method == "GET" else json.dumps(body)
        async with client_of(server) as client:
            return await client.request(method, path, content=content, headers=headers)

    answer = asyncio.run(once())
    route = server.app.openapi()["paths"].get(path, {}).get(method.lower())
    assert route is None or str(answer.status_code) in route["responses"], answer.text
    return answer


class Gated:
    """An engine's forward whose steps wait, after the first `free` ones, until it is opened."""

    def __init__(self, forward: Any, free: int = 3) -> None:
        self.forward, self.free = forward, free
        self.steps = 0
        self.open = threading.Event()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.forward, name)

    def __call__(self, **batch: Any) -> Any:
        self.steps += 1
        if self.steps > self.free:
            assert self.open.wait(LONG)
        return self.forward(**batch)


@contextmanager
def gated(server: Opened, free: int) -> Iterator[Gated]:
    """The steps of the server's engine wait in the block, after the first `free` ones."""
    forward = server.engine._forward
    gate = server.engine._forward = Gated(forward, free)
    try:
        yield gate
    finally:
        gate.open.set()
        server.engine._forward = forward


def idle(server: Opened) -> None:
    """Wait until the engine has nothing to do."""
    wait_until(lambda: not server.engine.batch_processor.has_pending_requests())


async def asgi(server: Opened, path: str, body: Any, receive: Any, send: Any) -> None:
    """Call the application with one request, as a server of HTTP does: `receive` is called for
    what comes after the body. Bytes are the beginning of a file."""
    part = isinstance(body, bytes)
    content = body if part else json.dumps(body).encode()
    kind = b"application/octet-stream" if part else b"application/json"
    coming = [{"type": "http.request", "body": content, "more_body": part}]

    async def read() -> Any:
        return coming.pop() if coming else await receive()

    scope = {
        **{"type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1"},
        **{"method": "POST", "scheme": "http", "path": path, "raw_path": path.encode()},
        **{"query_string": b"", "headers": [(b"content-type", kind)]},
        **{"client": ("test", 1), "server": ("test", 80)},
    }
    await asyncio.wait_for(server.app(scope, read, send), LONG)


def ids_of(files: Files, path: str, words: str) -> list[int]:
    """The prompt that a route makes of these words."""
    if path == "/v1/completions":
        return list(files.tokenizer(words)["input_ids"])
    return files.chat_ids(words)


def wait_for(client: httpx2.Client) -> None:
    """Wait until a server that is being started answers."""

    def healthy() -> bool:
        try:
            client.get("/health").raise_for_status()
        except httpx2.TransportError:
            return False
        return True

    wait_until(healthy)


def prompts(count: int, seed: int) -> list[str]:
    draw = random.Random(seed)
    return [
        " ".join(f"w{draw.randrange(7, 61)}" for _ in range(draw.randrange(1, 12)))
        for _ in range(count)
    ]


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


def events(text: str) -> list[dict[str, Any]]:
    """The events of a stream. Where they have names, these are their types."""
    found = []
    for event in text.split("\n\n"):
        fields = dict(line.split(": ", 1) for line in event.split("\n") if line)
        if fields.get("data", "[DONE]") != "[DONE]":
            found.append(json.loads(fields["data"]))
            assert fields.get("event") in (None, found[-1].get("type"))
    return found


def said(path: str, text: str) -> str:
    """The words of a stream of one of the routes."""
    found = events(text)
    assert not any("error" in event and event["error"] for event in found), found
    if path == "/v1/responses":
        return "".join(e["delta"] for e in found if e["type"] == "response.output_text.delta")
    if path == "/v1/messages":
        return "".join(e["delta"].get("text", "") for e in found if "delta" in e)
    if path == "/v1/completions":
        return "".join(e["choices"][0]["text"] for e in found)
    return "".join(e["choices"][0]["delta"].get("content") or "" for e in found)


def plain(path: str, answer: dict[str, Any]) -> str:
    """The words of an answer of one of the routes that is no stream."""
    if path == "/v1/messages":
        return "".join(block["text"] for block in answer["content"])
    if path == "/v1/responses":
        return str(answer["output"][0]["content"][0]["text"])
    choice = answer["choices"][0]
    return str(choice["text"] if path == "/v1/completions" else choice["message"]["content"])


def question(path: str, words: str, new: int, **others: Any) -> Mapping[str, Any]:
    """The body of a request of one of the routes."""
    if path == "/v1/completions":
        return {"prompt": words, "max_tokens": new, **others}
    if path == "/v1/responses":
        return {"input": words, "max_output_tokens": new, **others}
    messages = [{"role": "user", "content": words}]
    if path == "/v1/messages":
        return {"messages": messages, "max_tokens": new, **others}
    return {"messages": messages, "max_completion_tokens": new, **others}
