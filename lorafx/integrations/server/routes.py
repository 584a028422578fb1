"""Routes that generate nothing: what the server is, which models it has, and its tokenizer."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI

import lorafx
from lorafx.integrations.server.errors import RequestError
from lorafx.integrations.server.handlers import Chat, Completions, SequenceHandler


def add_routes(app: FastAPI, completions: Completions, chat: Chat) -> None:
    """Add vLLM's and OpenAI's routes of this kind to `app`."""
    served, generation = completions.served, completions.generation

    @app.get("/version")
    def version() -> dict[str, str]:
        return {"version": lorafx.__version__}

    @app.get("/v1/models/{name:path}")
    def model(name: str) -> dict[str, Any]:
        served.adapter_of(name)
        return served.entry(name)

    def prompt_of(body: dict) -> list[int]:
        served.adapter_of(body.pop("model", served.name))
        route: SequenceHandler = chat if "messages" in body else completions
        prompts = route.prompts(route.fields.read(body))
        if len(prompts) > 1:
            raise RequestError("there is one prompt here, not a list of them", "prompt")
        return prompts[0].ids

    @app.post("/tokenize")
    def tokenize(body: dict) -> dict[str, Any]:
        named = body.pop("return_token_strs", False)
        ids = prompt_of(body)
        return {
            "count": len(ids),
            "max_model_len": generation.most_tokens,
            "tokens": ids,
            "token_strs": served.tokenizer.convert_ids_to_tokens(ids) if named else None,
        }

    @app.post("/detokenize")
    def detokenize(body: dict) -> dict[str, Any]:
        tokens = body.get("tokens")
        if not isinstance(tokens, list) or prompt_of({**body, "prompt": tokens}) != tokens:
            raise RequestError(f"`tokens` is a list of token ids; got {tokens!r:.80}", "tokens")
        return {"prompt": served.tokenizer.decode(tokens)}
