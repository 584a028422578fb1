"""A server with a key: who comes without it is answered nothing."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx2
import openai
import pytest
from served import anew, ask, client_of, question

from lorafx.errors import ConfigError
from lorafx.integrations.server.errors import OPEN_ROUTES
from lorafx.integrations.server.ray import RaySettings
from lorafx.integrations.server.ray.application import Ingress
from lorafx.integrations.server.request_log import GENERATING
from lorafx.integrations.server.settings import Settings

KEY = "sk-Lora_1.2+3/4="
PATH = "/v1/completions"


@pytest.fixture(scope="module")
def locked(files, server):
    """The same model in an application with a key that lets clients load."""
    return anew(server, files, api_key=KEY, allow_runtime_loading=True)


@pytest.mark.parametrize(
    "key", [None, "", KEY, f"Basic {KEY}", "Bearer", f"Bearer {KEY}x", f"Bearer {KEY[:-1]}"]
)
def test_requests_without_the_key_are_refused(locked, key) -> None:
    routes: Any = locked.app.routes
    paths = {route.path for route in routes}
    assert {*OPEN_ROUTES, *GENERATING, "/v1/models", "/docs"} < paths
    for path in {*paths, "/v1/other", "/health/../v1/models"} - {*OPEN_ROUTES}:
        answer = ask(locked, "GET" if path == "/v1/models" else "POST", path, key=key, model="tiny")
        assert answer.status_code == 401, path
        assert answer.headers["www-authenticate"] == "Bearer"
        error = answer.json()["error"]
        assert (error["type"], error["code"]) == ("invalid_request_error", "invalid_api_key")
        assert "Authorization: Bearer" in error["message"]
        assert KEY not in answer.text
    assert ask(locked, "GET", "/health").json() == {"status": "ok"}
    assert "lorafx_requests_running 0.0" in ask(locked, "GET", "/metrics").text


def test_the_client_of_openai_with_the_key(files, locked) -> None:
    async def talk() -> Any:
        async with client_of(locked) as http:
            given: dict[str, Any] = {"base_url": "http://test/v1", "http_client": http}
            client = openai.AsyncOpenAI(api_key=KEY, **given)
            answer = await client.completions.create(model="tiny:a3", prompt="w9 w31", max_tokens=4)
            with pytest.raises(openai.AuthenticationError, match="not this server's"):
                await openai.AsyncOpenAI(api_key="none", **given).models.list()
            return answer.choices[0].text

    ids = files.tokenizer("w9 w31")["input_ids"]
    assert asyncio.run(talk()).strip() == files.text("a3", ids, 4)
    answer = ask(locked, "POST", PATH, key=f"bearer {KEY}", model="tiny", **question(PATH, "w9", 2))
    assert answer.status_code == 200


def test_the_key_is_in_no_text_of_the_settings(files, monkeypatch) -> None:
    given: dict[str, Any] = {"model": str(files.model), "adapters": files.adapters}
    assert KEY not in repr(Settings(**given, api_key=KEY))
    monkeypatch.setenv("LORAFX_API_KEY", KEY)
    given["adapters"] = str(files.adapters)
    settings = RaySettings(**given)
    assert KEY not in repr(settings)
    assert settings.api_key == KEY
    assert RaySettings(**given, api_key="other").api_key == "other"
    for wrong in ({"model": None}, {"apikey": KEY}, {"api_key": [KEY]}):
        with pytest.raises(ConfigError) as refused:
            RaySettings(**{**given, "api_key": KEY, **wrong})
        assert f"--{next(iter(wrong))}:".replace("_", "-") in str(refused.value)
        assert KEY not in str(refused.value)
    with pytest.raises(ConfigError, match="Field required") as refused:
        RaySettings(api_key=KEY)  # type: ignore[call-arg]
    assert KEY not in str(refused.value)


class Replicas:
    """A handle of Ray's that nobody may use."""

    def options(self, **_: Any) -> Replicas:
        return self

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(f"a replica was asked: {name}")


def test_no_replica_of_ray_is_asked_without_the_key(files) -> None:
    settings = Settings(model=str(files.model), adapters=files.adapters, api_key=KEY)
    handle: Any = Replicas()
    transport = httpx2.ASGITransport(app=Ingress(handle, settings).__serve_build_asgi_app__())

    async def once(key: str) -> Any:
        async with httpx2.AsyncClient(transport=transport, base_url="http://test") as client:
            headers = {"Authorization": f"Bearer {key}"}
            return await client.post(PATH, json={"model": "tiny:a0"}, headers=headers)

    assert asyncio.run(once("other")).status_code == 401
    with pytest.raises(AssertionError, match="a replica was asked: answer"):
        asyncio.run(once(KEY))
