"""What each client is asked to do, with a server whose model says what it is told
(obedient_server.py); and how a client says what worked."""

from __future__ import annotations

import asyncio
import inspect
import json
import os
from collections.abc import Mapping
from importlib import metadata
from typing import Any, Literal

from pydantic import BaseModel

SERVER = os.environ["LORAFX_SERVER"]
URL, KEY, MODEL = f"{SERVER}/v1", "none", "tiny:a1"
CHECKS = ("text", "stream", "tools", "forced", "structured", "second")


def say(text: str) -> str:
    """A message that has the model say `text`."""
    return f"Say «{text}»"


GREETING = "Good morning"
GREET, RECALL = say(GREETING), say("recall")


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def calling(name: str, **arguments: Any) -> str:
    """A message that has the model call a tool."""
    body = json.dumps({"name": name, "arguments": arguments})
    return say(f"<tool_call>\n{body}\n</tool_call>")


CALL, CITIES, SUNNY = calling("weather", city="Oslo"), ("Oslo", "Lima"), "sunny and 21 degrees"
PARAMETERS = {
    "type": "object",
    "properties": {"city": {"type": "string", "enum": [*CITIES]}},
    "required": ["city"],
    "additionalProperties": False,
}
FUNCTION = {"name": "weather", "description": "The weather in a city", "parameters": PARAMETERS}
TOOL = {"type": "function", "function": FUNCTION}


class Report(BaseModel):
    """The structured answer: any model comes to its end soon."""

    city: Literal["Oslo", "Lima"]
    warm: bool


def same(found: object, wanted: object) -> None:
    assert found == wanted, f"got {found!r}, not {wanted!r}"


def recalls(text: str | None) -> None:
    """Whether the model had the first question and its own answer before it."""
    for part in (f"user: {GREET}", f"assistant: {GREETING}"):
        assert part in (text or ""), f"{part!r} is not in {text!r}"


def streamed(pieces: list[str]) -> None:
    """Whether pieces are a greeting that came as a stream."""
    same("".join(pieces), GREETING)
    assert len([piece for piece in pieces if piece]) > 1, pieces


def report(client: str, package: str, scope: Mapping[str, Any], prefix: str = "") -> None:
    """Make the checks that a scope has, each by itself, and print what came of them as a line of
    JSON."""
    found = {}
    for name in CHECKS:
        if f"{prefix}{name}" not in scope:
            continue
        try:
            done = scope[f"{prefix}{name}"]()
            if inspect.isawaitable(done):
                asyncio.run(_awaited(done))
            found[name] = "yes"
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"[:600]
    row = {"client": client, "version": metadata.version(package), **found}
    print(json.dumps(row), flush=True)


async def _awaited(done: Any) -> None:
    await done
