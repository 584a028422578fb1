"""The choices of an answer in OpenAI's form, whole or in pieces."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple
from uuid import uuid4

from tokenizers import Tokenizer
from torch import Tensor
from transformers.cli.serving.utils import ReasoningText, ToolCall

from lorafx.generation.continuous.adapter_requests import SequenceOutput, TokenLogprobs
from lorafx.integrations.server.fields import ChatFields, CompletionFields, SequenceFields
from lorafx.integrations.server.texts import Decoder, MessageReader, SequenceText, Token

#: Stands for minus infinity, which JSON does not have; OpenAI's value.
_LOWEST = -9999.0


class Prompt(NamedTuple):
    """The token ids of a prompt, its text if the client sent one, and the inputs of the model if it
    has others than tokens."""

    ids: list[int]
    text: str | None = None
    inputs: Mapping[str, Tensor] | None = None


class Choice:
    """One sequence of an answer. `tokenizer` decodes, `ends` are the tokens that end a sequence."""

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
            ends,
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
        choice = {
            "index": self._index,
            **content,
            "logprobs": self._logprobs(tokens) if wanted else None,
            "finish_reason": self._reason(output),
            "stop_reason": output.stop_reason,
        }
        if self._fields.return_token_ids:
            choice["token_ids"] = [token.id for token in tokens]
        return choice

    def _reason(self, output: SequenceOutput) -> str | None:
        return output.finish_reason

    def _content(self, text: str, output: SequenceOutput, whole: bool) -> dict[str, Any]:
        """The text in the form of the route; empty if there is none to send before the end."""
        raise NotImplementedError

    def _logprobs(self, tokens: Sequence[Token]) -> dict[str, Any]:
        """The tokens and their logprobs in the form of the route."""
        raise NotImplementedError

    def _name(self, token: int) -> str:
        """The text of a single token, or its ID if that is asked for."""
        if self._fields.return_tokens_as_token_ids:
            return f"token_id:{token}"
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
        return {"text": text}  # also of a token without text, as in vLLM

    def _echo(self, output: SequenceOutput) -> str:
        """The prompt's text. Adds its tokens before those of the answer."""
        decoder = Decoder(self._tokenizer, self._fields.skip_special_tokens)
        begins, pieces = list[int](), list[str]()
        for token in self._prompt.ids:
            begins.append(decoder.length)
            pieces.append(decoder.step(token))
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
    """A choice of /v1/chat/completions, in whose text `parts` finds those of a message."""

    _fields: ChatFields

    def __init__(self, *args: Any, parts: MessageReader) -> None:
        super().__init__(*args, special=parts.special)
        self._parts = parts

    def _reason(self, output: SequenceOutput) -> str | None:
        named = self._fields.choice[0] == "named"  # which OpenAI's server says nothing of
        called = self._parts.calls and output.finish_reason == "stop" and not named
        return "tool_calls" if called else output.finish_reason

    def _content(self, text: str, output: SequenceOutput, whole: bool) -> dict[str, Any]:
        before = self._parts.calls
        found = self._parts.put(text, output)
        calls = [part for part in found if isinstance(part, ToolCall)]
        reasoning = "".join(part for part in found if isinstance(part, ReasoningText))
        said = "".join(part for part in found if type(part) is str)
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
                for index, call in enumerate(calls, before)
            ]
        if whole:
            return {"message": {"role": "assistant", "content": None if calls else "", **delta}}
        return {"delta": delta} if delta or output.is_finished() else {}

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
