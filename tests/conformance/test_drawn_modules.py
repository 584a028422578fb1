"""Drawn modules are right or refused, on both roads."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from both_roads import one_road
from drawn_modules import BLOCKS, INPUTS, Program, judged, random_program
from hypothesis import given, settings
from hypothesis import strategies as st
from slowly import each

import lorafx
from lorafx.runtime.entry import Entry

#: Programs that once found something.
KEPT: tuple[Program, ...] = (
    Program(("SequenceFirst", "ActingSubclass"), ("", "b"), ("b", "b")),  # a product expands x
    # Behind a graph break, and where Dynamo makes no graph, a copy is used and its module is not.
    Program(("Recurrent", "RoundedCopy"), ("a", "b"), (None, "a", "b", "a"), seed=24846),
    Program(("StackedState",), ("", "b"), ("b", "b"), dynamic=True),
    Program(("Borrowing",), ("b", "a"), (None, "a", "b")),  # the lender alone has the adapter
)

programs = st.builds(
    Program,
    blocks=st.lists(st.sampled_from(sorted(BLOCKS)), min_size=1, max_size=4).map(tuple),
    carried=st.lists(st.sampled_from(("a", "b", "ab", "")), min_size=3, max_size=3).map(tuple),
    names=st.lists(st.sampled_from(("a", "b", None)), min_size=1, max_size=4).map(tuple),
    form=st.sampled_from(sorted(INPUTS)),
    dynamic=st.sampled_from((False, False, False, True)),
    seed=st.integers(0, 1 << 16),
)


@pytest.fixture(autouse=True)
def _each_road_by_itself() -> Iterator[None]:
    with one_road():
        yield


@pytest.mark.parametrize("block", sorted(BLOCKS))
def test_each_block(block: str) -> None:
    for names in (("a", None, "b"), ("a",)):
        judged(Program((block,), ("ab",), names), "eager")


@pytest.mark.parametrize("block", each(6, sorted(BLOCKS)))
def test_each_block_in_a_graph(block: str) -> None:
    judged(Program((block,), ("ab",), ("a", None, "b")), "compiled")


def test_in_eager_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or a graph is asked for: those are in `test_compiled`, and behind each block alone above."""

    def asked(*arguments: Any, **named: Any) -> Any:
        raise lorafx.CaptureError("a graph is asked for")

    monkeypatch.setattr(Entry, "run_graph", asked)
    found = Counter[str]()

    @settings(max_examples=100, derandomize=True)
    @given(programs)
    def judge(program: Program) -> None:
        found[judged(program, "eager")] += 1

    judge()
    assert found["right"] > 25


@settings(max_examples=3, derandomize=True)
@given(programs)
def test_compiled(program: Program) -> None:
    """Blocks are compiled above, and thousands of programs are in `test_many`."""
    torch._dynamo.reset()
    judged(program, "compiled")


@pytest.mark.parametrize("program", KEPT, ids=str)
@pytest.mark.parametrize("start", ["eager", "compiled"])
def test_what_found_something(program: Program, start: str) -> None:
    judged(program, start)


@pytest.mark.slow
@pytest.mark.parametrize(("start", "count"), [("eager", 20_000), ("compiled", 2_000)])
def test_many(start: str, count: int) -> None:
    wrong = []
    for seed in range(count):
        torch._dynamo.reset()
        program = random_program(random.Random(seed))
        try:
            judged(program, start)
        except Exception as error:
            wrong.append(f"{program}: {type(error).__name__}: {error}")
    assert not wrong, "\n".join(wrong)
