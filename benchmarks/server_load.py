"""`lorafx serve` under load: many connections at once, clients that go away, and slow readers.

    python benchmarks/server_load.py --seconds 600

It starts the server on the demo model and asks it over sockets. Every answer under load is compared
with the answer to the same request alone. One JSON object is printed:

    crowd       answers, how many of them differ from those alone, connections that were lost, and
                the server's resident memory at each tenth of the time
    past_queue  of more requests at once than --max-queue allows: answers by status, and lost ones
    gone        seconds from when clients have left in the middle of answers until the engine has no
                sequence and no page of theirs
    slow        seconds for answers while other clients read nothing, and without them
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import re
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

EXAMPLES = Path(__file__).parents[1] / "examples"
MODELS = ("demo_model", "demo_model:upper", "demo_model:reverse")
PROMPTS = ("compiler>", "adapter>", "kernel>", "graph>")


class Answer(NamedTuple):
    """The status, the headers and the text of an answer; status 0 if the connection was lost."""

    status: int
    headers: str = ""
    text: str = ""


class Server:
    """The command, which listens when this is made. At the end of a `with` block it has ended."""

    def __init__(self, model: Path, adapters: Path, *options: str) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        command = [sys.executable, "-m", "lorafx", "serve", str(model), "--adapters", str(adapters)]
        command += ["--port", str(self.port), "--log-level", "warning", "--warmup", *options]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        while "ready after" not in (line := self.process.stdout.readline()):
            if not line:
                raise SystemExit("the server has not started")

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *error: object) -> None:
        self.process.terminate()
        try:
            self.process.wait(60)
        finally:
            self.process.kill()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def memory(self) -> float:
        """Its resident memory in MB."""
        pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        return round(pages * os.sysconf("SC_PAGE_SIZE") / 1e6, 1)

    async def open(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection("127.0.0.1", self.port)

    async def ask(self, body: dict[str, Any]) -> Answer:
        """The answer over a connection of its own."""
        try:
            reader, writer = await self.open()
            try:
                writer.write(_post(body))
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                text = (await reader.read()).decode()
            finally:
                writer.close()
        except (OSError, asyncio.IncompleteReadError):
            return Answer(0)
        status = int(head.split(" ", 2)[1])
        events = re.findall(r"^data: (\{.*\})\r?$", text, re.MULTILINE)
        said = (c["text"] for event in events for c in json.loads(event).get("choices", ()))
        if status == 200 and "data: [DONE]" not in text:
            return Answer(0)
        return Answer(status, head.lower(), "".join(said))

    async def busy(self) -> bool:
        """Whether the engine has sequences, or pages that one of them takes."""
        reader, writer = await self.open()
        writer.write(b"GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        text = (await reader.read()).decode()
        writer.close()
        names = "num_requests_running|num_requests_waiting|kv_cache_usage_perc"
        return any(float(v) for v in re.findall(rf"^vllm:(?:{names}){{.*}} (\S+)", text, re.M))


def _post(body: dict[str, Any]) -> bytes:
    content = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(content)}\r\n"
    head += "Content-Type: application/json\r\nConnection: close\r\n\r\n"
    return head.encode() + content


def _asked(model: str, prompt: str, tokens: int = 16) -> dict[str, Any]:
    fields = {"model": model, "prompt": prompt, "temperature": 0, "ignore_eos": True}
    return {**fields, "max_tokens": tokens, "stream": True}


def _request(draw: random.Random, tokens: int = 16) -> dict[str, Any]:
    return _asked(draw.choice(MODELS), draw.choice(PROMPTS), tokens)


async def crowd(server: Server, connections: int, seconds: float) -> dict[str, Any]:
    alone = {
        (model, prompt): (await server.ask(_asked(model, prompt))).text
        for model in MODELS
        for prompt in PROMPTS
    }
    ends, counts, memory = time.monotonic() + seconds, Counter[str](), list[float]()

    async def client(draw: random.Random) -> None:
        while time.monotonic() < ends:
            body = _request(draw)
            answer = await server.ask(body)
            counts["lost" if not answer.status else str(answer.status)] += 1
            if answer.status == 200:
                counts["different"] += answer.text != alone[body["model"], body["prompt"]]

    async def watch() -> None:
        for _ in range(10):
            await asyncio.sleep(seconds / 10)
            memory.append(server.memory())

    clients = (client(random.Random(seed)) for seed in range(connections))
    await asyncio.gather(watch(), *clients)
    return {**counts, "lost": counts["lost"], "memory_mb": memory}


async def past_queue(server: Server, count: int) -> dict[str, Any]:
    draw = random.Random(1)
    answers = await asyncio.gather(*(server.ask(_request(draw, 64)) for _ in range(count)))
    statuses = Counter("lost" if not a.status else str(a.status) for a in answers)
    told = sum("retry-after: " in answer.headers for answer in answers if answer.status == 429)
    return {**statuses, "with_retry_after": told}


async def gone(server: Server, count: int) -> float:
    draw, writers = random.Random(2), []
    for _ in range(count):
        reader, writer = await server.open()
        writer.write(_post(_request(draw, 10_000)))
        writers.append((reader, writer))
    for reader, _ in writers:
        await reader.readuntil(b"data: ")
    start = time.monotonic()
    for _, writer in writers:
        writer.close()
    while await server.busy():
        await asyncio.sleep(0.01)
    return round(time.monotonic() - start, 3)


async def slow(server: Server, count: int) -> dict[str, float]:
    async def timed() -> float:
        draw, start = random.Random(3), time.monotonic()
        await asyncio.gather(*(server.ask(_request(draw)) for _ in range(64)))
        return round(time.monotonic() - start, 3)

    without, sockets = await timed(), []
    for _ in range(count):
        idle = socket.socket()
        idle.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        idle.connect(("127.0.0.1", server.port))
        idle.sendall(_post(_request(random.Random(4))))
        sockets.append(idle)
    beside = await timed()
    for idle in sockets:
        idle.close()
    return {"without": without, "beside": beside}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--connections", type=int, default=512)
    parser.add_argument("--seconds", type=float, default=60)
    given = parser.parse_args(arguments)

    async def all_of_it(server: Server) -> dict[str, Any]:
        return {
            "crowd": await crowd(server, given.connections, given.seconds),
            "past_queue": await past_queue(server, given.connections * 3 // 2),
            "gone": await gone(server, 64),
            "slow": await slow(server, 32),
        }

    # A client may ask again a moment before its last request is counted as ended.
    queue = "--max-queue", str(given.connections + 64)
    with Server(EXAMPLES / "demo_model", EXAMPLES / "demo_adapters", *queue) as server:
        print(json.dumps(asyncio.run(all_of_it(server))))


if __name__ == "__main__":
    main()
