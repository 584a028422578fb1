"""Adapters of an engine take turns in the slots: driven step by step with a store of tiny banks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lorafx.adapter_store.store import AdapterStore
from lorafx.adapter_store.stored import Adapter, LoraWeights
from lorafx.generation.continuous.turns import LIMIT, PATIENCE, Asked, Turns
from lorafx.package.stand_in import substitute_for

SITE = {"path": "l", "kind": "linear", "dtype": "float32", "in": 1, "parts": {"l": 1}}


def store_of(slots: int, adapters: int) -> AdapterStore:
    sizes = {"max_adapters": slots, "max_rank": 1, "dtype": None, "prefix": ""}
    described = {"modules": ["l"], "sites": [SITE], "packed_modules": {}, **sizes}
    groups = substitute_for(described).groups
    store = AdapterStore(groups, slots)
    factors = LoraWeights(torch.ones(1, 1), torch.ones(1, 1), 1.0)
    for number in range(adapters):
        store.load(Adapter(f"a{number}", {"l": factors}, 1, ""))
    return store


@dataclass
class Request:
    adapter: int
    tokens: int
    begun: bool = False
    since: int = 0
    first: int = -1

    @property
    def asked(self) -> Asked:
        return Asked(self.adapter, f"a{self.adapter}", self.begun)


class Engine:
    """Steps of up to `rows` requests, those that have begun first."""

    def __init__(self, slots: int, adapters: int, rows: int) -> None:
        self.store, self.turns, self.rows = store_of(slots, adapters), Turns(), rows
        self.requests: list[Request] = []
        self.paused = self.now = 0

    def add(self, adapter: int, tokens: int) -> Request:
        request = Request(adapter, tokens, since=self.now)
        self.requests.append(request)
        return request

    def step(self) -> set[int]:
        """The adapters of one step."""
        self.requests.sort(key=lambda request: not request.begun)  # stable
        turn = self.turns.next((request.asked for request in self.requests), self.store)
        ready = [r for r in self.requests if turn.admits(r.asked)][: self.rows]
        begun = [{r.adapter for r in requests if r.begun} for requests in (self.requests, ready)]
        self.paused = len(begun[0]) - len(begun[1])
        self.store.acquire([f"a{r.adapter}" for r in ready])
        for request in ready:
            if not request.begun:
                request.begun, request.first = True, self.now
            request.tokens -= 1
        self.requests = [r for r in self.requests if r.tokens]
        self.now += 1
        return {request.adapter for request in ready}


def test_adapters_that_have_slots_together_are_all_served() -> None:
    engine = Engine(slots=2, adapters=2, rows=8)
    for adapter in (0, 1, 1):
        engine.add(adapter, 3)
    assert [engine.step() for _ in range(3)] == [{0, 1}] * 3


def test_an_adapter_keeps_its_slot_until_its_requests_have_ended() -> None:
    engine = Engine(slots=2, adapters=6, rows=8)
    for adapter in range(6):
        engine.add(adapter, 5)
    served = [engine.step() for _ in range(15)]
    assert served == [*[{0, 1}] * 5, *[{2, 3}] * 5, *[{4, 5}] * 5]
    assert engine.store.loads == 6


@pytest.mark.parametrize("tokens", [3, 20])
def test_adapters_for_which_requests_keep_coming_make_room(tokens: int) -> None:
    engine = Engine(slots=2, adapters=3, rows=16)
    for _ in range(30):
        engine.add(0, tokens), engine.add(1, tokens)
        engine.step()
    rare = engine.add(2, tokens)
    for _ in range(PATIENCE + tokens + 2):
        engine.add(0, tokens), engine.add(1, tokens)
        engine.step()
    assert rare.first >= 0


def test_long_requests_pause_after_the_limit() -> None:
    engine = Engine(slots=2, adapters=5, rows=8)
    engine.add(0, 10_000), engine.add(1, 10_000)
    engine.step()
    rare = [engine.add(adapter, 4) for adapter in (2, 3, 4)]
    paused = []
    for _ in range(4 * LIMIT):
        engine.step()
        paused.append(engine.paused)
    assert rare[0].first == LIMIT + 1
    assert all(request.first > 0 and not request.tokens for request in rare)
    assert max(paused) == 1  # a quarter of the slots, and at least one
    assert sum(paused) < len(paused) / 4


@given(
    st.integers(1, 4),
    st.lists(st.tuples(st.integers(0, 9), st.integers(1, 12), st.integers(0, 3)), max_size=40),
)
def test_every_request_is_served(slots: int, work: list[tuple[int, int, int]]) -> None:
    """However requests arrive, no step has more adapters than slots, and all of them end."""
    engine = Engine(slots, adapters=10, rows=6)
    for adapter, tokens, steps in work:
        engine.add(adapter, tokens)
        for _ in range(steps):
            assert len(engine.step()) <= slots
    left = sum(tokens for _, tokens, _ in work) + 1
    run: Callable[[], set[int]] = engine.step
    while engine.requests and left:
        assert len(run()) in range(1, slots + 1)
        left -= 1
    assert not engine.requests
