"""Images and sounds in chats: each request has the tokens of the model with its adapter merged in,
beside requests of text, and what is no image, or too large, is refused before it is decoded."""

from __future__ import annotations

import asyncio
import struct
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import httpx2
import numpy as np
import openai
import pytest
from dense_merge import Case
from PIL import Image, ImageFile
from seeing import (
    file_of,
    gemma3,
    image,
    image_part,
    qwen2_audio,
    sound,
    sound_part,
    write,
)
from served import SMALL, asgi, ask
from waiting import wait_until

from lorafx.integrations.server import fetching
from lorafx.integrations.server.run import Opened, opened
from lorafx.integrations.server.settings import Settings
from lorafx.runtime.beside.compilers import Compilers

CHAT = "/v1/chat/completions"
NEW = 6


class Seeing:
    """A served model with its processor, and what each of its adapters answers if merged."""

    def __init__(self, case: Case, processor: Any, server: Opened) -> None:
        self.case, self.processor, self.server = case, processor, server

    def text(self, adapter: str | None, words: str, **media: Any) -> str:
        count = sum(map(len, media.values()))
        content = [{"type": "image"}] * count + [{"type": "text", "text": words}]
        prompt = self.processor.tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        inputs = self.processor(
            text=[prompt], **media, return_tensors="pt", add_special_tokens=False
        )
        model: Any = self.case.alone(adapter)
        tokens = model.generate(**inputs, max_new_tokens=NEW, do_sample=False, pad_token_id=0)
        new = tokens[0, inputs["input_ids"].shape[1] :]
        return str(self.processor.tokenizer.decode(new, skip_special_tokens=True))

    def ask(self, content: Any, model: str = "model", **body: Any) -> Any:
        messages = [{"role": "user", "content": content}]
        return ask(self.server, "POST", CHAT, model=model, messages=messages, **body)


def serving(folder: Path, made: Any, targets: Any, **settings: Any) -> Any:
    case = write(folder, made, targets)
    modules = tuple(f"{name}={path}" for name, path in case.folders.items())
    given = {**SMALL, "max_adapters": 3, "temperature": 0, **settings}
    return case, opened(Settings(model=str(folder / "model"), lora_modules=modules, **given))


@contextmanager
def _eager() -> Iterator[None]:
    """No graph is compiled, which takes ten seconds a server."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LORAFX_START", "eager")
        patch.setattr(Compilers, "consider", lambda *_: False)
        yield


@pytest.fixture(scope="module")
def seeing(tmp_path_factory: pytest.TempPathFactory) -> Any:
    targets = {
        "language": ["language_model.layers.0.self_attn.q_proj", "mlp.down_proj"],
        "tower": ["vision_tower.encoder.layers.0.self_attn.v_proj", "mlp.fc1"],
    }
    made = gemma3()
    with _eager():
        case, opening = serving(
            tmp_path_factory.mktemp("seeing"),
            made,
            targets,
            max_pixels=1000,
            max_media_bytes=4000,
            allowed_media_domains=("localhost",),
        )
        with opening as server:
            yield Seeing(case, made[1], server)


PAGES: dict[str, tuple[int, dict[str, str], Callable[[], bytes]]] = {
    "/a.png": (200, {}, lambda: file_of(image(1))),
    "/large.png": (200, {}, lambda: bytes(10**6)),
    "/bomb.png": (200, {}, lambda: _bomb(60, 60)),
    "/moved.png": (302, {"Location": "/a.png"}, bytes),
    "/page.png": (200, {"Content-Type": "text/html"}, lambda: b"<html>"),
    "/none.png": (404, {}, bytes),
}


class Pages(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        status, headers, made = PAGES.get(self.path, (200, {}, bytes))
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.path == "/slow.png":
            with suppress(OSError):
                for _ in range(100):
                    self.wfile.write(b".")
                    time.sleep(0.05)
        with suppress(OSError):  # the reader has gone
            self.wfile.write(made())

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture(scope="module")
def pages() -> Iterator[str]:
    """The address of a host that is allowed."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Pages) as host:
        Thread(target=host.serve_forever, daemon=True).start()
        yield f"http://localhost:{host.server_port}"
        host.shutdown()


def test_images_at_allowed_addresses(seeing, pages) -> None:
    for adapter in (None, "tower"):
        parts = [_address(f"{pages}/a.png"), {"type": "text", "text": "w20"}]
        got = seeing.ask(parts, adapter or "model", max_tokens=NEW).json()
        want = seeing.text(adapter, "w20", images=[image(1)])
        assert got["choices"][0]["message"]["content"] == want


@pytest.mark.parametrize(
    ("page", "words"),
    [
        ("large", "more than 4000 bytes, which --max-media-bytes allows"),
        ("bomb", "--max-pixels"),
        ("moved", "cannot be fetched: HTTP Error 302"),
        ("page", "cannot be read as PNG"),
        ("none", "cannot be fetched: HTTP Error 404"),
        ("slow", "takes over 0.2 s"),
    ],
)
def test_what_is_refused_of_allowed_addresses(seeing, pages, monkeypatch, page, words) -> None:
    monkeypatch.setattr(fetching, "MOST_SECONDS", 0.2 if page == "slow" else 60)
    answer = seeing.ask([_address(f"{pages}/{page}.png")])
    assert answer.status_code == 400
    assert words in answer.json()["error"]["message"]


@pytest.fixture(scope="module")
def hearing(tmp_path_factory: pytest.TempPathFactory) -> Any:
    targets = {
        "tower": ["audio_tower.layers.0.self_attn.v_proj", "audio_tower.layers.0.fc2"],
        "connector": ["multi_modal_projector.linear", "language_model.layers.0.mlp.up_proj"],
    }
    made = qwen2_audio()
    with _eager():
        case, opening = serving(
            tmp_path_factory.mktemp("hearing"), made, targets, max_audio_seconds=0.5
        )
        with opening as server:
            yield Seeing(case, made[1], server)


def test_sounds(hearing) -> None:
    for adapter in (None, "tower", "connector"):
        sounds = [sound(1), sound(2, 2400)]
        samples = [np.frombuffer(data[44:], "<i2") / np.float32(32768) for data in sounds]
        parts = [*map(sound_part, sounds), {"type": "text", "text": "w20 w21"}]
        got = hearing.ask(parts, adapter or "model", max_tokens=NEW).json()
        want = hearing.text(adapter, "w20 w21", audio=samples)
        assert got["choices"][0]["message"]["content"] == want
        assert (want == hearing.text(None, "w20 w21", audio=samples)) == (adapter is None)


def test_mixed_requests_have_the_answers_of_merged_models(seeing) -> None:
    """Images and text, of adapters and the base, all at once by OpenAI's client, also streamed."""
    asked = [
        (adapter, f"w{20 + seed} w{30 + seed}", [image(seed)] if seed % 3 else [])
        for seed, adapter in enumerate((None, "language", "tower", "language", None, "tower"))
    ]
    asked.append(("tower", "w40", [image(8), image(9, 10, 30)]))

    pieces: list[int] = []  # of each stream

    async def answers() -> list[str]:
        transport = httpx2.ASGITransport(app=seeing.server.app)
        async with httpx2.AsyncClient(transport=transport, base_url="http://test") as http:
            client = openai.AsyncOpenAI(
                base_url="http://test/v1", api_key="none", http_client=http, max_retries=0
            )

            async def answer(adapter: str | None, words: str, images: Any, stream: bool) -> str:
                parts = [*(image_part(file_of(picture)) for picture in images)]
                body: Any = {
                    "model": adapter or "model",
                    "messages": [
                        {"role": "user", "content": [*parts, {"type": "text", "text": words}]}
                    ],
                    "max_completion_tokens": NEW,
                    "stream": stream,
                }
                if not stream:
                    return (await client.chat.completions.create(**body)).choices[0].message.content
                chunks = [c async for c in await client.chat.completions.create(**body)]
                said = [c.choices[0].delta.content for c in chunks if c.choices]
                pieces.append(len([piece for piece in said if piece]))
                assert chunks[-1].choices[0].finish_reason in ("stop", "length")
                return "".join(piece or "" for piece in said)

            return await asyncio.gather(
                *(answer(*question, stream=i % 2 == 0) for i, question in enumerate(asked))
            )

    got = asyncio.run(answers())
    want = [
        seeing.text(adapter, words, **({"images": images} if images else {}))
        for adapter, words, images in asked
    ]
    assert got == want
    assert max(pieces) > 2
    # Adapters changed answers, those of the tower also.
    for adapter, words, images in asked:
        if adapter and images:
            assert seeing.text(adapter, words, images=images) != seeing.text(
                None, words, images=images
            )


def _bomb(width: int, height: int) -> bytes:
    """A PNG whose header says this size, and whose pixels are not there."""
    data = bytearray(file_of(image(0)))
    data[16:24] = struct.pack(">II", width, height)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    return bytes(data)


def _address(address: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": address}}


@pytest.mark.parametrize(
    ("part", "words"),
    [
        (image_part(_bomb(60, 60)), "--max-pixels"),
        (image_part(_bomb(60_000, 60_000)), "--max-pixels"),
        (image_part(file_of(image(1, 40, 40))), "--max-media-bytes"),
        (image_part(file_of(image(1))[:400]), "cannot be read as PNG"),
        (image_part(b"nothing"), "cannot be read as PNG"),
        (image_part(file_of(image(1), "webp")), "cannot be read as PNG"),
        (_address("data:image/png;base64,$$$$"), "no base64"),
        (_address("http://127.0.0.1/a.png"), "not one of --allowed-media-domains"),
        (_address("http://allowed.test@127.0.0.1/a.png"), "its host '127.0.0.1' is not one"),
        (_address("https://[::1/a.png"), "is no address"),
        (_address("file:///etc/hostname"), "images come as"),
        (_address("data:text/html;base64,AAAA"), "images come as"),
        ({"type": "image_url"}, "images come as"),
        (sound_part(sound(1)), "the model takes no audio"),
        ({"type": "video_url", "video_url": {}}, "one of the types"),
        ({"type": ["text"]}, "one of the types"),
        (3, "one of the types"),
    ],
)
def test_what_is_refused(seeing, monkeypatch, part, words) -> None:
    """Each names its place, and no pixels are made of what is too large."""
    if "--max" in words:
        monkeypatch.setattr(Image.Image, "load", None)
        monkeypatch.setattr(ImageFile.ImageFile, "load", None)
    answer = seeing.ask([{"type": "text", "text": "w20"}, part])
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert words in error["message"]
    assert error["message"].startswith("messages[0].content[1]: ")
    assert error["param"] == "messages[0].content[1]"


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (sound(1, 9000), "--max-audio-seconds"),
        (sound(1)[:-3], "its end is missing"),
        (sound(1)[:30], "cannot be read as wav"),
        (sound(1, rate=8000), "16 bits at 16000 Hz; got 16 bits at 8000 Hz"),
        (sound(1, width=1), "got 8 bits"),
        (sound(1, 0), "0 samples"),
    ],
)
def test_what_is_refused_of_sounds(hearing, data, words) -> None:
    answer = hearing.ask([sound_part(data)])
    assert answer.status_code == 400
    assert words in answer.json()["error"]["message"]


def test_bounds_are_of_the_request(seeing, files, server) -> None:
    several = [image_part(file_of(image(1)))] * 3  # 1,440 pixels
    assert "content[2]" in seeing.ask(several).json()["error"]["param"]
    count = [image_part(file_of(image(1, 2, 2)))] * 17
    assert "--max-media" in seeing.ask(count).json()["error"]["message"]
    small = [image_part(file_of(image(1)))]
    for body, field in (
        ({"truncate_prompt_tokens": 4}, "truncate_prompt_tokens"),
        ({"prompt_logprobs": 1}, "prompt_logprobs"),
    ):
        answer = seeing.ask(small, **body)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, field)
    # A model of text.
    message = [{"role": "user", "content": small}]
    answer = ask(server, "POST", CHAT, model="tiny", messages=message)
    assert answer.status_code == 400
    assert "content[0]: the model takes no image" in answer.json()["error"]["message"]


def test_fields_and_counts_are_those_of_text(seeing) -> None:
    """Draws by seeds, stops, log-probabilities and `n`; and the metrics count the request."""
    small = [image_part(file_of(image(1))), {"type": "text", "text": "w20 w21"}]
    free = seeing.ask(small, "tower", max_tokens=NEW, logprobs=True, top_logprobs=2).json()
    tokens = free["choices"][0]["logprobs"]["content"]
    said = [token["token"] for token in tokens]
    assert [token["top_logprobs"][0]["token"] for token in tokens] == said
    assert free["usage"] == {**free["usage"], "prompt_tokens": 10, "completion_tokens": len(said)}
    assert free["adapter_version"] is not None
    stopped = seeing.ask(small, "tower", max_tokens=NEW, stop=said[1]).json()["choices"][0]
    assert (stopped["finish_reason"], stopped["stop_reason"]) == ("stop", said[1])
    drawn = {"temperature": 1.5, "seed": 3, "n": 2, "max_tokens": NEW}
    texts = [
        [choice["message"]["content"] for choice in seeing.ask(small, **drawn).json()["choices"]]
        for _ in range(2)
    ]
    assert texts[0] == texts[1]
    assert texts[0][0] != texts[0][1]
    metrics = ask(seeing.server, "GET", "/metrics").text
    assert 'lorafx_requests_total{adapter="tower",status="200"}' in metrics
    assert seeing.server.engine.sequences() == {"running": [], "waiting": []}


def test_a_client_that_goes_away(seeing) -> None:
    """The request ends before its next token, those that wait behind it are answered, and text is
    answered while it runs."""
    engine = seeing.server.engine
    small = [image_part(file_of(image(1))), {"type": "text", "text": "w20 w21"}]
    body = {"model": "tower", "max_tokens": 200, "stream": True, "ignore_eos": True}
    body["messages"] = [{"role": "user", "content": small}]

    async def go() -> int:
        left, sent = asyncio.Event(), 0

        async def receive() -> Any:
            await left.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            nonlocal sent
            sent += bool(message.get("body"))
            if sent == 3:
                left.set()

        await asgi(seeing.server, CHAT, body, receive, send)
        return sent

    assert asyncio.run(go()) < 100
    wait_until(lambda: not engine.busy)
    got = seeing.ask(small, max_tokens=NEW).json()["choices"][0]["message"]["content"]
    assert got == seeing.text(None, "w20 w21", images=[image(1)])
