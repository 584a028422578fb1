"""The text of a sequence, token by token, up to its stop; and the parts of a message in it.

tokens ── Decoder ─▶ text ── SequenceText, up to a stop ─▶ text ── MessageReader ─▶ text, reasoning,
                                                                                  calls of tools
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream
from transformers.cli.serving.utils import ReasoningText
from transformers.utils.chat_parsing.response_templates import ResponseTemplate

from lorafx.generation.continuous.adapter_requests import SequenceOutput, TokenLogprobs
from lorafx.torch_internals.response_parser import CALLS, AnswerParser

#: The fields of a response template that have reasoning.
REASONING = frozenset(("reasoning_content", "reasoning", "thinking"))


class Decoder:
    """Decodes token by token. All pieces together are the decoded text of all tokens: `end` has
    what tokenizers' `DecodeStream` would hold back, and bytes that are no text do not end it.

    Attributes:
        length: the number of characters so far.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True) -> None:
        self._tokenizer, self._skip = tokenizer, skip_special_tokens
        self._stream = DecodeStream([], skip_special_tokens=self._skip)
        self._tokens: list[int] = []
        self.length = 0

    def step(self, token: int) -> str:
        """The text that this token completes."""
        self._tokens.append(token)
        try:
            text = self._stream.step(self._tokenizer, token) or ""
        except Exception:  # tokenizers raises this class when earlier text has changed
            self._stream = DecodeStream(self._tokens, skip_special_tokens=self._skip)
            return self.end()
        self.length += len(text)
        return text

    def end(self) -> str:
        """The text that was held back."""
        whole = self._tokenizer.decode(self._tokens, skip_special_tokens=self._skip)
        text = whole[self.length :]
        self.length += len(text)
        return text


class Token(NamedTuple):
    """A token of a prompt or an answer: its logprobs, where they were asked for, and the place in
    the answer's text at which it begins."""

    id: int
    logprobs: TokenLogprobs | None
    begins: int


class SequenceText:
    """The text of one sequence. What may become one of the `stops` is held back until it is known,
    and of a stop that ends the sequence nothing is sent unless `with_stop`; neither is the text of
    a token among the `ends`, or of one that was asked for as a stop.

    Attributes:
        count: the number of tokens so far.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stops: Sequence[str],
        ends: Collection[int],
        *,
        skip_special_tokens: bool = True,
        with_stop: bool = False,
    ) -> None:
        self._decoder = Decoder(tokenizer, skip_special_tokens)
        self._ends, self._with_stop = ends, with_stop
        self._stops = [] if with_stop else stops
        self._text, self._tokens = "", list[Token]()
        self._sent = 0
        self.count = 0

    def put(self, output: SequenceOutput) -> tuple[str, list[Token]]:
        """The text and the tokens that may be sent after this output, which is the last one if it
        is finished."""
        ended = output.is_finished()
        for token in output.generated_tokens[self.count :]:
            logprobs = output.token_logprobs[self.count] if output.token_logprobs else None
            self._tokens.append(Token(token, logprobs, self._decoder.length))
            self.count += 1
            last = ended and self.count == len(output.generated_tokens)
            if not (last and self._is_stop(output, token)):
                self._text += self._decoder.step(token)
        if ended:
            self._text += self._decoder.end()
            if isinstance(output.stop_reason, str):
                self._cut(output.stop_reason)
        begins, self._sent = self._sent, len(self._text) - (0 if ended else self._unsure())
        text = self._text[begins : self._sent]
        tokens = [token for token in self._tokens if ended or token.begins < self._sent]
        self._tokens = self._tokens[len(tokens) :]
        return text, tokens

    def _is_stop(self, output: SequenceOutput, token: int) -> bool:
        if output.finish_reason != "stop" or self._with_stop:
            return False
        return output.stop_reason == token or (output.stop_reason is None and token in self._ends)

    def _cut(self, stop: str) -> None:
        """End the text at a stop, which the last token has completed."""
        last = self._tokens[-1].begins if self._tokens else 0
        at = self._text.find(stop, max(last - len(stop) + 1, 0))
        if at >= 0:
            end = at + len(stop) * self._with_stop
            self._text = self._text[:end]
            self._tokens = [token for token in self._tokens if token.begins < end]

    def _unsure(self) -> int:
        """The length of the longest end of the text with which a stop begins."""
        most = max(map(len, self._stops), default=1) - 1
        for length in range(min(most, len(self._text)), 0, -1):
            if any(stop.startswith(self._text[-length:]) for stop in self._stops):
                return length
        return 0


class MessageReader:
    """What `parser` finds in the text of an answer: `str`, `ReasoningText` and `ToolCall`; of
    calls only the first unless `parallel`. Without a parser all is text.

    Attributes:
        special: whether it looks for special tokens.
        calls: the number of calls so far.
    """

    def __init__(self, parser: AnswerParser | None, parallel: bool) -> None:
        self._parser, self._most = parser, sys.maxsize if parallel else 1
        self.special = parser is not None
        self.calls = 0

    def put(self, text: str, output: SequenceOutput) -> list[Any]:
        """The parts that are complete with this text, which is what `output` has brought."""
        if self._parser is None:
            return [text] if text else []
        events = self._parser.feed(text)
        if output.is_finished():
            by_itself = output.finish_reason == "stop" and output.stop_reason is None
            events += self._parser.end(cut=not by_itself)
        parts = list[Any]()
        for event in events:
            kind, field = event["type"], event["field"]
            if kind == "region_chunk" and field == "content":
                parts.append(event["text"])
            elif kind == "region_chunk" and field in REASONING:
                parts.append(ReasoningText(event["text"]))
            elif kind == "region_close" and field == CALLS:
                calls = event["value"][: self._most - self.calls]
                self.calls += len(calls)
                parts += calls
        return parts


class MessageSequence(NamedTuple):
    """The `text` of an answer of one sequence, in which `parts` finds the parts of a message."""

    prompt_tokens: int
    text: SequenceText
    parts: MessageReader

    def put(self, output: SequenceOutput) -> list[Any]:
        """The parts that are complete after an output."""
        return self.parts.put(self.text.put(output)[0], output)


def opened_reasoning(template: ResponseTemplate, prompt: str, begun: str) -> str:
    """The mark of the block of reasoning in which a prompt ends, or "". `begun` is the beginning of
    the answer if the prompt has one, in which text may follow the mark. Any other prompt has to end
    with the mark, since users may have written what stands before."""
    text = begun or f"{prompt}\n"  # some marks end with a newline, which templates may strip
    for name in REASONING & template.fields.keys():
        field = template.fields[name]
        marks = [] if field.open_re is None else [*field.open_re.finditer(text)]
        rest = text[marks[-1].end() :] if marks else ""
        closed = bool(begun and field.close_re and field.close_re.search(rest))
        if marks and not closed and (begun or not rest.strip()):
            return str(marks[-1].group())
    return ""
