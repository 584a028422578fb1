"""Patterns over module paths: what `re` says, or refused when the time is up."""

from __future__ import annotations

import re
import time
from contextlib import suppress

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from lorafx.model.targets import LONGEST, Pattern, PatternError

pytestmark = pytest.mark.quick

PATHS = [
    "",
    "lm_head",
    "model.embed_tokens",
    "model.layers.17.self_attn.q_proj",
    *(
        f"model.{tower}.layers.{i}.{name}"
        for tower in ("language_model", "vision_tower.encoder")
        for i in (0, 7, 16, 19, 23, 101)
        for name in ("self_attn.q_proj", "self_attn.v_proj", "self_attn.k", "mlp.up_proj")
    ),
]
#: What people write.
USUAL = [
    r"^(?!.*vision).*\.(q_proj|v_proj)$",
    r".*language_model.*\.(q|k|v)_proj",
    r"model\.layers\.(1[6-9]|2\d)\..*",
    r"(.*\.)?(k)$",
    r"(.*\.)?(^model\.language_model.*layers.(7|23).*_proj)$",
    r"(?:.*?(?:vision|image|visual|patch_embed).*?(?:self_attn|attention|attn).*?(?:q_proj|k_proj))"
    r"|(?:\bmodel\.language_model\.layers\.[\d]{1,}\.(?:self_attn|mlp)\.(?:(?:q_proj|up_proj)))",
    r".*(?<!self_attn)\.(up_proj|k)",
    r"(?i).*Q_PROJ",
    r"(\w+\.)*q_proj",
    r"[^.]+(\.[^.]+){3,6}",
    r"model.*layers.*self.*attn.*proj",
]


@pytest.mark.parametrize("text", USUAL)
def test_what_people_write(text: str) -> None:
    pattern = Pattern(text)
    for path in PATHS:
        assert pattern.fullmatches(path) == (re.fullmatch(text, path) is not None), path
    assert any(map(pattern.fullmatches, PATHS))


def _patterns() -> st.SearchStrategy[str]:
    one = st.sampled_from(
        ["a", "b", r"\.", ".", r"\d", r"\w", "[ab]", "[^a.]", "[a-c1]", "1", r"\W", r"[\d.]"]
    )
    places = st.sampled_from(["^", "$", r"\b", r"\B", r"\A", r"\Z"])

    def more(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
        repeats = st.sampled_from(["*", "+", "?", "*?", "+?", "{2}", "{1,3}", "{0,2}?", "{2,}"])
        looks = st.sampled_from(["(?={})", "(?!{})", "(?i:{})", "(?s:{})"])
        return st.one_of(
            st.lists(inner, min_size=1, max_size=4).map("".join),
            st.lists(inner, min_size=1, max_size=3).map(lambda parts: f"({'|'.join(parts)})"),
            st.tuples(inner, repeats).map(lambda pair: f"(?:{pair[0]}){pair[1]}"),
            st.tuples(looks, inner).map(lambda pair: pair[0].format(pair[1])),
            st.tuples(st.sampled_from(["(?<=ab)", "(?<!a)", r"(?<=[b.]\d)"]), inner).map("".join),
        )

    return st.recursive(st.one_of(one, one, places), more, max_leaves=8)


@settings(max_examples=100)
@example(text="b[ab](a1)", path="aa1")
@given(text=_patterns(), path=st.text("abB1._\n", min_size=1, max_size=7))
def test_it_says_what_re_says(text: str, path: str) -> None:
    try:
        pattern = Pattern(text)
    except PatternError:
        assume(False)  # repeats inside of repeats
    assert pattern.fullmatches(path) == (re.fullmatch(text, path) is not None)


#: Patterns that take `re` minutes and more on a path that they nearly match.
CATASTROPHIC = ["(a+)+$", "(a|a)*b", "(.*a){20}", ".*.*.*.*.*.*.*.*x", "(?!(a|a)*b)a*c"]


@pytest.mark.parametrize("text", CATASTROPHIC)
def test_patterns_that_backtrack_for_ever(text: str) -> None:
    """Each match ends, with an answer or with an error that names the pattern."""
    pattern = Pattern(text)
    for path in ("a" * 200, "x" * 200, "a" * 99 + "." + "a" * 99):
        started = time.process_time()
        with suppress(PatternError):
            pattern.fullmatches(path)
        assert time.process_time() - started < 1


def test_a_match_that_takes_too_long_is_an_error() -> None:
    with pytest.raises(PatternError, match=r"the pattern '.*' takes over 0.1 seconds .*aaa"):
        Pattern(r"(?:(a|b|.)*(b|a|.)*)*[^a]\d").fullmatches("a" * 200 + "c")


REFUSED = {
    "(((a{200}b){200}c){200})": "repeats over",
    "(" * 10_000 + "a" + ")" * 10_000: "nested too deep",
    "a{99999999999999999999}": "not a regular expression",
    "a" * (LONGEST + 1): "characters",
    "[": "not a regular expression",
    "a(?i)": "not a regular expression",
}


@pytest.mark.parametrize("text", REFUSED, ids=range(len(REFUSED)))
def test_patterns_that_are_refused(text: str) -> None:
    started = time.process_time()
    with pytest.raises(PatternError, match=REFUSED[text]):
        Pattern(text)
    assert time.process_time() - started < 1
