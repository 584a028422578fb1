"""`lorafx serve` with a model that says what it is told: clients are tried, not the model.

The engine, the routes, the parsers and the grammars are the server's own, and the model is a tiny
one that was never trained. Only its choice of tokens is led: it writes what stands in `«...»` in
the last message as far as the request's grammar lets it, and then ends. It repeats what a tool
has returned, and lists all messages before if it is told to `recall`.
"""

from __future__ import annotations

import copy
import re
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from served import SMALL, write_files
from spoken import tokenizer
from torch import Tensor

from lorafx.integrations.server import generating
from lorafx.integrations.server import run as run_module
from lorafx.integrations.server.messages import text_messages
from lorafx.integrations.server.settings import Settings

#: Of the vocabulary: each byte, and three signs. An agent's prompt has thousands of bytes.
SIZE, POSITIONS = 259, 16384


def told(messages: list[dict[str, Any]]) -> str:
    """What the model is told to say."""
    *before, last = messages
    if last["role"] == "tool":
        return f"It says: {last['content']}"
    said = ["", *re.findall(r"«(.*?)»", last["content"], re.DOTALL)][-1]
    if said == "recall":
        return "; ".join(f"{message['role']}: {message['content']}" for message in before)
    return said


class Led:
    """A grammar that leads the choice of tokens to the first of some texts that it lets begin, and
    to a near end behind that. `own` is the request's grammar, `ids` are the tokens of the texts, of
    signs that close something, and of blanks; `end` ends an answer."""

    def __init__(self, own: Any, ids: Sequence[list[int]], end: int) -> None:
        self._own, self._ids, self._end = own, ids, end
        *self._texts, self._closing, self._blanks = ids

    def __deepcopy__(self, memo: dict[int, Any]) -> Led:
        return Led(copy.deepcopy(self._own, memo), self._ids, self._end)

    def bitmask(self, generated: Sequence[int]) -> Tensor:
        allowed = torch.ones(SIZE, dtype=torch.bool)
        if self._own is not None:
            allowed = self._own.bitmask(generated)
        count = len(generated)
        for text in self._texts:
            wanted = [*text, self._end][count : count + 1]
            if text[:count] == list(generated) and allowed[wanted].any():
                return _only(wanted)
        closing = [token for token in (self._end, *self._closing) if allowed[token]]
        if closing:
            return _only(closing[:1])
        short = allowed.clone()
        short[self._blanks] = False
        return short if short.any() else allowed

    def ended(self, generated: Sequence[int]) -> bool:
        return self._own is not None and self._own.ended(generated)


def _only(tokens: list[int]) -> Tensor:
    mask = torch.zeros(SIZE, dtype=torch.bool)
    mask[tokens] = True
    return mask


class ObedientModel(generating.GeneratingModel):
    """Has the model of chats say what it is told."""

    async def arguments(self, fields: Any, source: Any) -> dict[str, Any]:
        arguments = await super().arguments(fields, source)
        if not hasattr(fields, "messages"):
            return arguments
        texts = (told(text_messages(fields.messages)), "<tool_call>", '}]"', " \n\r\t")
        ids = self.tokenizer([*texts], add_special_tokens=False)["input_ids"]
        led = Led(arguments.get("grammar"), ids, self.tokenizer.eos_token_id)
        return {**arguments, "grammar": led}


def main(port: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        sizes = {"num_hidden_layers": 1, "max_position_embeddings": POSITIONS, "vocab_size": SIZE}
        files = write_files(Path(name), **sizes)
        tokenizer().save_pretrained(files.model)
        sizes = {**SMALL, "page_size": 16, "num_blocks": POSITIONS // 16, "max_batch_tokens": 1024}
        run_module.run(
            Settings(model=str(files.model), adapters=files.adapters, port=port, **sizes)
        )


if __name__ == "__main__":
    run_module.GeneratingModel = ObedientModel
    main(int(sys.argv[1]))
