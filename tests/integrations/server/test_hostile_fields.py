"""A hostile value of every field, of the wrong type, the longest, the deepest, not finite, is an
answer of status 4xx, before the engine hears of it. Other requests go on meanwhile."""

from __future__ import annotations

import asyncio
import difflib
import json
import threading
import time
from typing import Any

from served import anew, ask, client_of, question
from waiting import LONG

from lorafx.integrations.server import fields as fields_of_requests
from lorafx.integrations.server.anthropic import AnthropicFields
from lorafx.integrations.server.errors import RequestError
from lorafx.integrations.server.fields import ChatFields, CompletionFields, ResponseFields
from lorafx.integrations.server.grammars import Grammars

PATHS = {
    "/v1/completions": CompletionFields,
    "/v1/chat/completions": ChatFields,
    "/v1/responses": ResponseFields,
    "/v1/messages": AnthropicFields,
}
CHOOSING = fields_of_requests._CHOOSING.split()


def nested(depth: int) -> str:
    return "[" * depth + "]" * depth


JSON = {"content-type": "application/json"}
HOSTILE = {
    "an object": '{"a": {"b": [1]}}',
    "not a number": "NaN",
    "infinite": "1e999",
    "many digits": "9" * 4000,
    "deep": nested(400),
    "deepest": nested(100_000),
    "many entries": json.dumps([*range(3000)]),
    "many keys": json.dumps(dict.fromkeys(map(str, range(3000)), 0)),
    "long": json.dumps("w7 " * 50_000),
    "half a pair": '"\\ud800"',
}
#: What some of these are by right: a number of tokens is at most what there is room for.
LENGTHS = ("max_tokens", "max_completion_tokens", "max_output_tokens", "truncate_prompt_tokens")
RIGHT = {("an object", "chat_template_kwargs"), ("an object", "text")}
RIGHT |= {("many digits", name) for name in LENGTHS}


def cases() -> list[tuple[str, str]]:
    found = []
    for path, fields in PATHS.items():
        names = {*fields.model_fields, *CHOOSING, "model", "structured_outputs"} - {"choosing"}
        found += [(path, name) for name in sorted(names)]
    return found


def test_a_hostile_value_of_any_field_is_refused(server, monkeypatch):
    def heard(**_: Any) -> None:
        raise RuntimeError("the engine has heard of it")

    monkeypatch.setattr(server.engine, "_forward", heard)

    async def check(client: Any, path: str, field: str, kind: str) -> None:
        others = {"model": "tiny", **question(path, "w9", 2)}
        others.pop(field, None)
        content = f'{json.dumps(others)[:-1]}, "{field}": {HOSTILE[kind]}}}'
        before = time.process_time()
        answer = await client.post(path, content=content, headers=JSON)
        seconds = time.process_time() - before
        case = path, field, kind, answer.text[:300]
        assert 400 <= answer.status_code < 500, case
        assert len(answer.text) < 2000, case
        assert seconds < 5, case  # of CPU, for what takes tens of milliseconds

    async def check_all() -> None:
        async with client_of(server) as client:
            for path, field in cases():
                for kind in HOSTILE:
                    if (kind, field) not in RIGHT:
                        await check(client, path, field, kind)

    asyncio.run(check_all())


def test_a_body_of_many_fields(server):
    answer = ask(
        server, "POST", "/v1/completions", model="tiny", **dict.fromkeys(map(str, range(200)), 0)
    )
    assert answer.status_code == 400
    assert "--max-fields" in answer.json()["error"]["message"]


def test_prompts_are_counted_before_they_are_read(server, files, monkeypatch):
    small = anew(server, files, max_queue=8)
    monkeypatch.setattr(type(files.tokenizer), "__call__", None)
    answer = ask(small, "POST", "/v1/completions", model="tiny", prompt=["w9"] * 9)
    assert answer.status_code == 400
    assert "9 sequences" in answer.json()["error"]["message"]


def test_other_requests_go_on_while_a_grammar_is_made(server, monkeypatch):
    """It is made in a thread, which waits here for another request's answer."""
    answered = threading.Event()

    def compiled(*_: Any) -> None:
        assert answered.wait(LONG)
        raise RequestError("no grammar")

    monkeypatch.setattr(Grammars, "compiled", compiled)

    async def both() -> None:
        body = {"model": "tiny", **question("/v1/completions", "w9", 2)}
        slow = {**body, "structured_outputs": {"regex": "a"}}
        async with client_of(server) as client:
            waiting = asyncio.create_task(client.post("/v1/completions", json=slow))
            await asyncio.sleep(0)
            assert (await client.post("/v1/completions", json=body)).status_code == 200
            answered.set()
            assert (await waiting).status_code == 400

    asyncio.run(both())


def test_a_long_name_is_compared_with_none(server, monkeypatch):
    compared, near = [], difflib.get_close_matches

    def noted(name: str, *others: Any, **how: Any) -> list[str]:
        compared.append(len(name))
        return near(name, *others, **how)

    monkeypatch.setattr(difflib, "get_close_matches", noted)
    answer = ask(server, "POST", "/v1/completions", model="m" * 100_000, prompt="w9")
    assert answer.status_code == 404
    assert max(compared, default=0) < 100
