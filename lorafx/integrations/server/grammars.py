"""Grammars that answers keep to, by llguidance: JSON schemas, regular expressions, alternatives,
and grammars in Lark's notation."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from lorafx.errors import LorafxError
from lorafx.integrations.server.errors import RequestError
from lorafx.integrations.server.fields import GrammarSource


def _alternatives(words: Any) -> str:
    if not isinstance(words, list) or not words:
        raise ValueError(f"`choice` is a list of strings, at least one; got {words!r:.80}")
    # One terminal: alternatives of a rule are limited to 2,000.
    texts = " | ".join(json.dumps(word, ensure_ascii=False) for word in words)
    return f"start: CHOICE\nCHOICE: {texts}"


class Grammars:
    """Makes grammars over the tokens of one tokenizer, for logits of `size`."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, size: int) -> None:
        self._tokenizer, self._size = tokenizer, size

    @cached_property
    def _tokens(self) -> Any:
        from llguidance.hf import from_tokenizer

        return from_tokenizer(self._tokenizer, n_vocab=self._size)

    def compiled(self, source: GrammarSource) -> MatcherGrammar:
        """The grammar of a request. Raises RequestError if it cannot be made."""
        try:
            from llguidance import LLMatcher

            make: Mapping[str, Callable[[Any], str]] = {
                "json": LLMatcher.grammar_from_json_schema,
                "regex": LLMatcher.grammar_from_regex,
                "choice": lambda words: LLMatcher.grammar_from_lark(_alternatives(words)),
                "grammar": LLMatcher.grammar_from_lark,
            }
            matcher = LLMatcher(self._tokens, make[source.kind](source.value), log_level=0)
        except ImportError as error:
            raise RequestError(
                f"`{source.field}` needs llguidance on the server: pip install 'lorafx[grammar]'",
                source.field,
            ) from error
        except (TypeError, ValueError) as error:
            raise RequestError(f"`{source.field}`: {error}", source.field) from error
        if matcher.is_error():
            raise RequestError(f"`{source.field}`: {matcher.get_error()}", source.field)
        return MatcherGrammar(matcher, self._size)


class MatcherGrammar:
    """What llguidance lets come next in one sequence. A copy has a state of its own."""

    def __init__(self, matcher: Any, size: int) -> None:
        self._matcher, self._size = matcher, size
        #: The number of tokens that the matcher has read.
        self._read = 0

    def __deepcopy__(self, _: dict[int, Any]) -> MatcherGrammar:
        copied = MatcherGrammar(self._matcher.deep_copy(), self._size)
        copied._read = self._read
        return copied

    def bitmask(self, generated: Sequence[int]) -> Tensor:
        """Which tokens may come next: bool (vocabulary,)."""
        self._advance(generated)
        allowed = torch.frombuffer(bytearray(self._matcher.compute_logit_bias()), dtype=torch.uint8)
        return allowed[: self._size] != 0

    def ended(self, generated: Sequence[int]) -> bool:
        """Whether nothing can come any more."""
        self._advance(generated)
        return bool(self._matcher.is_stopped())

    def _advance(self, generated: Sequence[int]) -> None:
        """Read the tokens that are new. Raises LorafxError if the grammar does not allow them."""
        self._matcher.consume_tokens(list(generated[self._read :]))
        self._read = len(generated)
        if self._matcher.is_error():
            why = self._matcher.get_error().partition("\n")[0]  # the whole grammar follows
            raise LorafxError(f"the grammar of the request failed: {why}")
