"""Chat with answers that are forced: each byte is a token, so that any text can be one."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

from served import client_of
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.cli.serving.utils import get_response_template
from waiting import LONG

CHAT, RESPONSES = "/v1/chat/completions", "/v1/responses"
SHOWN = "{{ messages | tojson }}{% if tools %}{{ tools | tojson }}{% endif %}"
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
#: What transformers has for models of these types: no model of them is needed.
QWEN, QWEN_XML, GEMMA = (
    get_response_template(None, SimpleNamespace(config=SimpleNamespace(model_type=kind)))
    for kind in ("qwen3", "qwen3_5", "gemma4")
)


def tokenizer(chat_template: str = SHOWN, response_template: Any = QWEN) -> PreTrainedTokenizerFast:
    """Each byte is a token, from 3 on."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    signs = ["<pad>", "<s>", "</s>", *alphabet]
    made = Tokenizer(models.BPE({sign: i for i, sign in enumerate(signs)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    templates = {"chat_template": chat_template, "response_template": response_template}
    return PreTrainedTokenizerFast(tokenizer_object=made, **special, **templates)


def answers(server, bodies: list[dict[str, Any]], path: str = CHAT) -> list[Any]:
    """The answers to requests that are sent at one time."""

    async def all_at_once():
        async with client_of(server) as client:
            sent = [client.post(path, json={"model": "tiny", **body}) for body in bodies]
            return await asyncio.wait_for(asyncio.gather(*sent), LONG)

    return asyncio.run(all_at_once())


def call(body: str) -> str:
    return f"<tool_call>{body}</tool_call>"


GOOD = '{"name": "f", "arguments": {"x": 1}}'
