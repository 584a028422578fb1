"""Text up to a stop, in pieces and whole, and the logprobs of the tokens that are sent."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers.generation.continuous_batching.requests import RequestStatus

from lorafx.generation.continuous.adapter_requests import SequenceOutput, TokenLogprobs
from lorafx.integrations.server.texts import SequenceText, Token

pytestmark = pytest.mark.quick
#: Tokens of one to three letters, so that a stop may begin and end within one.
LETTERS = ["".join(word) for size in (1, 2, 3) for word in itertools.product("ab", repeat=size)]
END = len(LETTERS)


def letters() -> Tokenizer:
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate([*LETTERS, "</s>"])}, "a"))
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(["</s>"])
    return tokenizer


def engine(tokens: list[int], stops: list[str], most: int) -> tuple[list[int], str | None, str]:
    """What an engine generates of these tokens: up to the one that completes a stop."""
    text = ""
    for count, token in enumerate(tokens[:most], 1):
        text += LETTERS[token]
        for stop in stops:
            if stop in text:
                return tokens[:count], stop, text
    return tokens[:most], None, text


def outputs(tokens: list[int], stop: str | int | None, cuts: list[int]) -> list[SequenceOutput]:
    """The outputs of a stream that has grown to each of `cuts`, and then to its end."""
    made = []
    for count in [*sorted(c for c in cuts if c < len(tokens)), len(tokens)]:
        ended = count == len(tokens)
        made.append(
            SequenceOutput(
                "r",
                generated_tokens=tokens[:count],
                token_logprobs=[TokenLogprobs(t, -1.0, 1, ()) for t in tokens[:count]],
                status=RequestStatus.FINISHED if ended else RequestStatus.DECODING,
                finish_reason=("length" if stop is None else "stop") if ended else None,
                stop_reason=stop if ended else None,
            )
        )
    return made


def put_all(text: SequenceText, made: list[SequenceOutput]) -> list[tuple[str, list[Token]]]:
    return [text.put(output) for output in made]


@given(
    st.lists(st.integers(0, END - 1), min_size=1, max_size=12),
    st.lists(st.text("ab", min_size=1, max_size=4), max_size=3, unique=True),
    st.lists(st.integers(1, 12), max_size=12, unique=True),
    st.booleans(),
)
def test_nothing_of_a_stop_is_sent(
    tokens: list[int], stops: list[str], cuts: list[int], with_stop: bool
) -> None:
    tokens, stop, text = engine(tokens, stops, 12)
    want = text
    if stop is not None:
        want = text[: text.index(stop) + len(stop) * with_stop]
    made = outputs(tokens, stop, cuts)
    pieces = put_all(SequenceText(letters(), stops, (), with_stop=with_stop), made)
    assert "".join(text for text, _ in pieces) == want
    # A stream sends tokens with their text, and is together the whole answer.
    starts = list(itertools.accumulate([0, *(len(LETTERS[t]) for t in tokens)]))
    kept = [
        t for t, start in zip(tokens, starts, strict=False) if stop is None or start < len(want)
    ]
    assert [token.id for _, sent in pieces for token in sent] == kept
    sent = 0
    for (piece, with_it), output in zip(pieces, made, strict=True):
        sent += len(piece)
        assert all(token.begins < sent for token in with_it)
        so_far = "".join(LETTERS[t] for t in output.generated_tokens)
        held = so_far[sent:]
        if not output.is_finished():  # no more is held back than might become a stop
            assert not held or any(s.startswith(held) for s in stops if not with_stop)


@pytest.mark.parametrize("with_stop", [False, True])
@pytest.mark.parametrize(("reason", "last"), [(None, END), (3, 3)])
def test_a_token_that_ends_a_sequence_is_no_text(reason: Any, last: int, with_stop: bool) -> None:
    output = outputs([0, 1, last], reason, [])[0]
    output.finish_reason = "stop"
    text = SequenceText(letters(), [], [END], skip_special_tokens=False, with_stop=with_stop)
    piece, sent = text.put(output)
    assert piece == "ab" + ("" if not with_stop else (*LETTERS, "</s>")[last])
    assert [token.id for token in sent] == [0, 1, last]


def test_an_earlier_stop_that_did_not_count() -> None:
    """Before `min_tokens` a stop ends nothing."""
    a, b = LETTERS.index("a"), LETTERS.index("b")
    for cuts in ([], [1, 2, 3, 4]):
        made = outputs([a, b, a, a, b], "ab", cuts)
        pieces = put_all(SequenceText(letters(), ["ab"], ()), made)
        assert "".join(text for text, _ in pieces) == "aba"
