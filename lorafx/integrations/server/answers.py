"""Answers with choices, whole or as a stream of events.

sequences ── outputs ─▶ Choice, one for each sequence ─▶ ChoicesAnswer
"""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

from lorafx.errors import LorafxError
from lorafx.integrations.server.choices import Choice, Prompt
from lorafx.integrations.server.errors import error_response
from lorafx.integrations.server.fields import SequenceFields
from lorafx.integrations.server.generating import Sequences


class ChoicesAnswer:
    """An answer with a choice for each sequence. Its `head` is what all chunks of a stream have in
    common. In a `chat` choices are messages, and fields of the prompt stand beside them."""

    def __init__(
        self,
        fields: SequenceFields,
        prompts: Sequence[Prompt],
        choices: Sequence[Choice],
        head: dict[str, Any],
        chat: bool = False,
    ) -> None:
        self._options, self._prompts, self._choices = fields.stream_options, prompts, choices
        self._head, self._chat = {**head, "created": int(time.time())}, chat

    async def whole(self, sequences: Sequences) -> dict[str, Any]:
        """The answer when all sequences have ended."""
        answer: dict[str, Any] = {**self._head, "choices": [None] * len(self._choices)}
        async for index, output in sequences.outputs():
            answer["choices"][index] = self._choices[index].put(output, whole=True)
            answer |= versions_of(output)
            place = answer if self._chat else answer["choices"][index]
            place.update(self._choices[index].of_prompt(output))
        return {**answer, "usage": self._usage()}

    async def events(self, sequences: Sequences) -> AsyncIterator[str]:
        """The events of a stream."""
        unnamed = range(len(self._choices) if self._chat else 0)
        delta = {"role": "assistant", "content": ""}
        try:
            async for index, output in sequences.outputs():
                self._head |= versions_of(output)
                for choice in unnamed:  # not before: clients measure the time to the first chunk
                    yield self._chunk([{"index": choice, "delta": delta, "finish_reason": None}])
                unnamed = range(0)
                piece = self._choices[index].put(output)
                if piece is not None:
                    yield self._chunk([piece], self._options.get("continuous_usage_stats"))
            if self._options.get("include_usage"):
                yield self._chunk([], True)
        except LorafxError as error:
            yield f"data: {bytes(error_response(error).body).decode()}\n\n"
        yield "data: [DONE]\n\n"

    def _chunk(self, choices: list[Any], counted: bool | None = False) -> str:
        usage = self._usage() if counted else None
        asked = {"usage": usage} if self._options.get("include_usage") else {}
        whole = json.dumps({**self._head, "choices": choices, **asked}, ensure_ascii=False)
        return f"data: {whole}\n\n"

    def _usage(self) -> dict[str, int]:
        prompt = sum(len(prompt.ids) for prompt in self._prompts)
        new = sum(choice.text.count for choice in self._choices)
        counts = {"prompt_tokens": prompt, "completion_tokens": new}
        return {**counts, "total_tokens": prompt + new}


def versions_of(output: Any) -> dict[str, Any]:
    """The versions that a sequence is generated or a vector computed with, as fields of an answer.
    Those of all sequences of a request are the same."""
    return {name: getattr(output, name) for name in ("adapter_version", "weights_version")}
