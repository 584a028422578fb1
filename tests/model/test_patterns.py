"""Patterns over module paths: what `re` says, in bounded time."""

from __future__ import annotations

import re
import time

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from lorafx.model.patterns import LONGEST, Pattern, PatternError

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
        assert pattern.matches(path) == (re.match(text, path) is not None), path
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


@settings(max_examples=300, deadline=None)
@example(text="b[ab](a1)", path="aa1")
@given(text=_patterns(), path=st.text("abB1._\n", max_size=7))
def test_it_says_what_re_says(text: str, path: str) -> None:
    try:
        pattern = Pattern(text)
    except PatternError:
        assume(False)  # repeats inside of repeats
    assert pattern.fullmatches(path) == (re.fullmatch(text, path) is not None)
    assert pattern.matches(path) == (re.match(text, path) is not None)
    assert path.endswith(pattern.tail) or not pattern.fullmatches(path)


#: Patterns that take `re` minutes and more on a path that they nearly match.
CATASTROPHIC = [
    "(a+)+$",
    "(a|a)*b",
    "(a|aa)+$",
    "(.*a){20}",
    "(a?){40}a{40}",
    "(a|b|ab)*c",
    ".*.*.*.*.*.*.*.*x",
    "(?:a*)*b",
    "(a?a?)*b",
    "(?=(a+)+b)a",
    "(?!(a|a)*b)a*c",
    "(x+x+)+y",
    "(a*?)*?b",
    "(a|a?)+b",
]


@pytest.mark.parametrize("text", CATASTROPHIC)
def test_patterns_that_backtrack_for_ever(text: str) -> None:
    pattern = Pattern(text)
    started = time.process_time()
    for path in ("a" * 200, "x" * 200, "a" * 99 + "." + "a" * 99):
        pattern.fullmatches(path)
    assert time.process_time() - started < 0.5


REFUSED = {
    "((((a+b)+c)+d)+e)+": "steps for each module",
    "(((a{200}b){200}c){200})": "steps for each module",
    "(a)\\1": "a back-reference",
    "(a)?(?(1)b|c)": "a condition on a group",
    "(?L)a": "not a regular expression",
    "(?m)^a": "flags other than",
    "(" * 10_000 + "a" + ")" * 10_000: "nested deeper",
    "(" * 60 + "a" + ")" * 60: "nested deeper",
    "a{99999999999999999999}": "not a regular expression",
    "a" * (LONGEST + 1): "characters",
    "[": "not a regular expression",
    "(a": "not a regular expression",
    "a**": "not a regular expression",
    "a(?i)": "not a regular expression",
}


@pytest.mark.parametrize("text", REFUSED, ids=range(len(REFUSED)))
def test_patterns_that_are_refused(text: str) -> None:
    started = time.process_time()
    with pytest.raises(PatternError, match=REFUSED[text]):
        Pattern(text)
    assert time.process_time() - started < 1


def test_the_dearest_pattern_that_is_let_through() -> None:
    """Near the bound, on the longest paths that models have."""
    text = "(?:(?:a|b|ab|ba|[ab]){1,15}x?)*" + ".*a" * 100
    pattern = Pattern(text)
    assert pattern.cost > 20_000
    started = time.process_time()
    pattern.fullmatches("ab" * 100)
    assert time.process_time() - started < 0.5
