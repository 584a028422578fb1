"""The choices of an answer in OpenAI's form, whole or in pieces: a sequence's text up to its stop,
the logprobs of its tokens, and the calls of tools that it holds.

tokens ── Decoder ─▶ text ── SequenceText, up to a stop ─▶ Choice ── a message's parser ─▶ JSON
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, NamedTuple
from uuid import uuid4

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream
from transformers.cli.serving.utils import ReasoningText, ToolCall, response_events_to_chunks
from transformers.utils.chat_parsing import ResponseParser

from lorafx.generation.continuous.adapter_requests import SequenceOutput, TokenLogprobs
from lorafx.integrations.server.errors import RequestError
from lorafx.integrations.server.fields import ChatFields, CompletionFields, SequenceFields
from lorafx.progress import LOG

#: Stands for minus infinity, which JSON does not have; OpenAI's value.
_LOWEST = -9999.0


class Decoder:
    """Decodes as tokenizers' `DecodeStream` does, but `end` has what that would hold back, and
    bytes that are no text do not end it: all pieces together are the decoded text of all tokens.

    Attributes:
        length: the number of characters so far.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True) -> None:
        self._tokenizer, self._skip = tokenizer, skip_special_tokens
        self._stream = DecodeStream([], skip_special_tokens=self._skip)
        self._tokens: list[int] = []
        self.length = 0

    def step(self, tokenizer: Tokenizer, token: int) -> str | None:
        """The text that this token completes; None for none."""
        self._tokens.append(token)
        try:
            text = self._stream.step(tokenizer, token) or ""
        except Exception:  # tokenizers raises this class when earlier text has changed
            self._stream = DecodeStream(self._tokens, skip_special_tokens=self._skip)
            return self.end() or None
        self.length += len(text)
        return text or None

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
        self._tokenizer, self._decoder = tokenizer, Decoder(tokenizer, skip_special_tokens)
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
                self._text += self._decoder.step(self._tokenizer, token) or ""
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


class Prompt(NamedTuple):
    """The token ids of a prompt, and its text if the client sent one."""

    ids: list[int]
    text: str | None = None


class Choice:
    """One sequence of an answer. `tokenizer` decodes, `ends` are the tokens that end a sequence."""

    #: How many calls of tools were sent.
    _calls = 0

    def __init__(
        self,
        index: int,
        prompt: Prompt,
        fields: SequenceFields,
        tokenizer: Any,
        ends: Collection[int],
        *,
        special: bool = False,
    ) -> None:
        self._index, self._prompt, self._fields = index, prompt, fields
        self._tokenizer: Tokenizer = tokenizer.backend_tokenizer
        #: Its text, and the number of its tokens.
        self.text = SequenceText(
            self._tokenizer,
            fields.stops,
            () if special else ends,
            skip_special_tokens=fields.skip_special_tokens and not special,
            with_stop=fields.include_stop_str_in_output,
        )
        self._tokens: list[Token] = []

    def put(self, output: SequenceOutput, *, whole: bool = False) -> dict[str, Any] | None:
        """What is new after this output, or the `whole` choice if it is the only output; None if
        there is nothing to send."""
        text, tokens = self.text.put(output)
        self._tokens += tokens
        content, ended = self._content(text, output, whole), output.is_finished()
        if not (content or ended):
            return None
        tokens, self._tokens = self._tokens, []
        wanted = self._fields.of_tokens is not None
        reason = "tool_calls" if self._calls else output.finish_reason
        choice = {
            "index": self._index,
            **content,
            "logprobs": self._logprobs(tokens) if wanted else None,
            "finish_reason": reason if ended else None,
            "stop_reason": output.stop_reason,
        }
        if self._fields.return_token_ids:
            choice["token_ids"] = [token.id for token in tokens]
        return choice

    def _content(self, text: str, output: SequenceOutput, whole: bool) -> dict[str, Any]:
        """The text in the form of the route; empty if there is none to send before the end."""
        raise NotImplementedError

    def _logprobs(self, tokens: Sequence[Token]) -> dict[str, Any]:
        """The tokens and their logprobs in the form of the route."""
        raise NotImplementedError

    def _name(self, token: int) -> str:
        """The text of a single token."""
        return self._tokenizer.decode([token], skip_special_tokens=False)

    def of_prompt(self, output: SequenceOutput) -> dict[str, Any]:
        """vLLM's fields for the tokens of the prompt, those that were asked for."""
        fields: dict[str, Any] = {}
        if self._fields.prompt_logprobs is not None:
            fields["prompt_logprobs"] = [
                found and self._ranked(found) for found in output.prompt_logprobs
            ]
        if self._fields.return_token_ids:
            fields["prompt_token_ids"] = self._prompt.ids
        return fields

    def _ranked(self, found: TokenLogprobs) -> dict[str, Any]:
        likely = found.top[: self._fields.prompt_logprobs]
        ranks = {token: (rank, logprob) for rank, (token, logprob) in enumerate(likely, 1)}
        ranks[found.token] = (found.rank, found.logprob)
        return {
            str(token): {
                "logprob": _finite(value),
                "rank": rank,
                "decoded_token": self._name(token),
            }
            for token, (rank, value) in ranks.items()
        }


class CompletionChoice(Choice):
    """A choice of /v1/completions."""

    _fields: CompletionFields
    #: The length of the prompt's text before the answer, once that has been added.
    _echoed: int | None = None

    def _content(self, text: str, output: SequenceOutput, whole: bool) -> dict[str, Any]:
        if self._fields.echo and self._echoed is None:
            text = self._echo(output) + text
        return {"text": text} if text or output.is_finished() else {}

    def _echo(self, output: SequenceOutput) -> str:
        """The prompt's text. Adds its tokens before those of the answer."""
        decoder = Decoder(self._tokenizer, self._fields.skip_special_tokens)
        begins, pieces = list[int](), list[str]()
        for token in self._prompt.ids:
            begins.append(decoder.length)
            pieces.append(decoder.step(self._tokenizer, token) or "")
        pieces.append(decoder.end())
        text = "".join(pieces) if self._prompt.text is None else self._prompt.text
        self._echoed = len(text)
        scores = output.prompt_logprobs or [None] * len(begins)
        places = (place - len(text) for place in begins)  # the answer begins at 0
        self._tokens[:0] = map(Token, self._prompt.ids, scores, places)
        return text

    def _logprobs(self, tokens: Sequence[Token]) -> dict[str, Any]:
        return {
            "tokens": [self._name(token.id) for token in tokens],
            "token_logprobs": [t.logprobs and _finite(t.logprobs.logprob) for t in tokens],
            "top_logprobs": [t.logprobs and self._likeliest(t.logprobs) for t in tokens],
            "text_offset": [token.begins + (self._echoed or 0) for token in tokens],
        }

    def _likeliest(self, found: TokenLogprobs) -> dict[str, float]:
        """The likeliest tokens and the one that was chosen, by their texts. Where tokens have the
        same text, the likeliest counts."""
        names: dict[str, float] = {}
        for token, logprob in (*found.top[: self._fields.logprobs], (found.token, found.logprob)):
            names.setdefault(self._name(token), _finite(logprob))
        return names


class ChatChoice(Choice):
    """A choice of /v1/chat/completions. `parser` is transformers' parser of the model's answers;
    None if they are plain text."""

    _fields: ChatFields

    def __init__(self, *args: Any, parser: ResponseParser | None) -> None:
        # A parser looks for special tokens, and for those that end an answer.
        super().__init__(*args, special=parser is not None)
        self._parser = parser
        self._items: list[Any] = []
        if parser is not None:
            self._items += response_events_to_chunks(parser.initial_events)

    def _content(self, text: str, output: SequenceOutput, whole: bool) -> dict[str, Any]:
        items, self._items = self._items + self._parsed(text, output.is_finished()), []
        said = "".join(i for i in items if isinstance(i, str) and not isinstance(i, ReasoningText))
        reasoning = "".join(item for item in items if isinstance(item, ReasoningText))
        calls = [item for item in items if isinstance(item, ToolCall)]
        if not self._fields.parallel_tool_calls:
            calls = calls[: 1 - self._calls]
        delta: dict[str, Any] = {"content": said} if said else {}
        if reasoning:
            delta["reasoning_content"] = reasoning
        if calls:
            delta["tool_calls"] = [
                {
                    **({} if whole else {"index": index}),
                    **{"id": f"call_{uuid4().hex}", "type": "function"},
                    "function": {"name": call.name, "arguments": call.arguments},
                }
                for index, call in enumerate(calls, self._calls)
            ]
        self._calls += len(calls)
        if whole:
            return {"message": {"role": "assistant", "content": None if calls else "", **delta}}
        return {"delta": delta} if delta or output.is_finished() else {}

    def _parsed(self, text: str, ended: bool) -> list[Any]:
        """The parts of a message that are complete with this text."""
        if self._parser is None:
            return [text]
        try:
            items = response_events_to_chunks(self._parser.feed(text))
        except Exception as error:  # of a template's patterns: only this answer fails
            why = f"the answer does not have the form of the model's template: {error}"
            raise RequestError(why, status=500) from error
        if ended:
            try:
                items += response_events_to_chunks(self._parser.finalize()[1])
            except (ValueError, RuntimeError) as error:  # the answer ended within a call
                LOG.warning("the end of an answer cannot be parsed, and is left out: %s", error)
        return items

    def _logprobs(self, tokens: Sequence[Token]) -> dict[str, Any]:
        return {"content": [self._entry(t.logprobs) for t in tokens if t.logprobs is not None]}

    def _entry(self, found: TokenLogprobs) -> dict[str, Any]:
        likely = found.top[: self._fields.top_logprobs or 0]
        top = [self._named(token, logprob) for token, logprob in likely]
        return {**self._named(found.token, found.logprob), "top_logprobs": top}

    def _named(self, token: int, logprob: float) -> dict[str, Any]:
        name = self._name(token)
        return {"token": name, "logprob": _finite(logprob), "bytes": list(name.encode())}


def _finite(logprob: float) -> float:
    return max(logprob, _LOWEST)
