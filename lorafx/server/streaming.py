"""A stream of text that is, when it has ended, the text of the answer as a whole.

pieces of the tokens as they come + what was held back = decode(all tokens)
"""

from __future__ import annotations

import asyncio
from typing import Any

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream
from transformers.cli.serving.utils import CBStreamer, response_events_to_chunks


class TextStreamer(CBStreamer):
    """Decodes the tokens of one request for `queue`.

    tokenizers' `DecodeStream` holds back tokens that are not a whole character yet, and raises at
    bytes that are no text. Here what is still held back at the end is said then, and a stream goes
    on behind such bytes.

    Args:
        engine: cancels the request.
        request_id: its name there.
        tokenizer: decodes.
        queue: takes the pieces, and None when there are no more.
        parser: transformers' parser of the model's answers; None where they are plain text.
    """

    def __init__(
        self, engine: Any, request_id: str, tokenizer: Tokenizer, queue: asyncio.Queue, parser: Any
    ) -> None:
        loop = asyncio.get_running_loop()
        super().__init__(engine, request_id, tokenizer, loop, queue, response_parser=parser)
        self._ids: list[int] = []
        self._said = 0

    def put(self, output: Any) -> None:
        """Say what the tokens that have come since are."""
        for token in output.generated_tokens[self.total_tokens :]:
            self.total_tokens += 1
            self._ids.append(token)
            try:
                text = self._decode_stream.step(self._tokenizer, token) or ""
            except Exception:  # a bare one of tokenizers: the text before is another one now
                text = self._rest()
                self._decode_stream = DecodeStream(
                    self._ids, skip_special_tokens=self._parser is None
                )
            self._say(text)

    def end(self) -> None:
        """Say what was held back, and that there is no more."""
        self._say(self._rest())
        super().end()

    def _rest(self) -> str:
        """What has not been said of the tokens that have come."""
        whole = self._tokenizer.decode(self._ids, skip_special_tokens=self._parser is None)
        return whole[self._said :]

    def _say(self, text: str) -> None:
        if not text:
            return
        self._said += len(text)
        items = [text]
        if self._parser is not None:
            items = response_events_to_chunks(self._parser.feed(text))
        for item in items:
            self._queue.put_nowait(item)
