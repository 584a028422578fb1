"""Shares of an engine's adapters: tokens by weight while requests wait, and bounds of what runs."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
from step_logits import StepCounts, answers, check_logits
from transformers.generation.configuration_utils import ContinuousBatchingConfig

from lorafx import LorafxError, Share
from lorafx.adapter_store.names import BASE, SUMS
from lorafx.generation.continuous.shares import Asking, Shares

pytestmark = pytest.mark.usefixtures("earlier_objects_frozen", "in_eager_mode")
SIZES = {"num_blocks": 512, "max_batch_tokens": 48, "max_requests_per_batch": 8}
CONFIG = ContinuousBatchingConfig(page_size=4, **SIZES)


def add(engine: Any, adapter: str | None, count: int) -> dict[str, str | None]:
    """Requests of an adapter: name -> adapter."""
    draw = random.Random(count)
    pairs = [(draw.choices(range(3, 61), k=2 + i % 5), 2 + i % 4) for i in range(count)]
    return {engine.add_request(p, adapter=adapter, max_new_tokens=n): adapter for p, n in pairs}


def serve(cm: Any, shares: Any, work: Sequence[tuple[str | None, int]], case: Any) -> StepCounts:
    """So many requests of each adapter, added at once; all answers are those of dense merge."""
    adapters: dict[str, str | None] = {}
    with cm.continuous_batching(None, CONFIG, warmup=False, shares=shares) as engine:
        seen = StepCounts(engine)
        with engine.pause():
            for adapter, count in work:
                adapters |= add(engine, adapter, count)
        check_logits(case, seen, answers(engine, [*adapters]), adapters)
    return seen


@pytest.mark.parametrize(
    ("shares", "work", "ratio"),
    [
        ({"a0": Share(weight=3.0)}, [("a1", 40), ("a0", 80)], 3),
        ({None: Share(), "a1": Share()}, [("a1", 150), (None, 20)], 1),
        ({None: Share(weight=0.5)}, [("a1", 60), (None, 40)], 0.5),
    ],
)
def test_tokens_are_as_the_weights_while_both_wait(llama, cm, shares, work, ratio):
    seen = serve(cm, shares, work, llama)
    first, second = (BASE if adapter is None else adapter for adapter, _ in work)
    both = [c["tokens"] for c in seen.counts if c["waiting"][first] and c["waiting"][second]]
    tokens = sum(both, Counter())
    assert tokens.total() > 200
    assert tokens[second] / tokens[first] == pytest.approx(ratio, rel=0.15)


def test_more_adapters_than_slots_with_shares(llama, with_slots):
    shares = {"a0": Share(weight=100.0), "a1": Share(most_running=1)}
    seen = serve(with_slots(2), shares, [(f"a{i}", 6) for i in range(4)], llama)
    assert seen.most("a1") == 1


def test_a_bound_holds_for_all_versions_and_holds_nobody_up(llama, cm):
    with cm.continuous_batching(None, CONFIG, warmup=False) as engine:
        engine.set_share("a1", Share(most_running=2))
        seen = StepCounts(engine)
        with engine.pause():
            adapters = add(engine, "a1", 6)
            cm.load_adapter(llama.folders["a2"], "a1")
            adapters |= dict.fromkeys(add(engine, "a1", 6), "a2")
            adapters |= add(engine, "a0", 4) | add(engine, None, 2)
        check_logits(llama, seen, answers(engine, [*adapters]), adapters)
    assert seen.most("a1") == 2
    assert seen.counts[0]["running"] == {"a1": 2, "a0": 4, BASE: 2}


def test_sequences_of_one_request_count_once(cm):
    shares = {"a1": Share(most_running=1)}
    with cm.continuous_batching(None, CONFIG, warmup=False, shares=shares) as engine:
        seen = StepCounts(engine)
        with engine.pause():
            work = [([5, 6], "a1", 3), ([7], "a1", 3), ([8], {"a1": 0.5}, 1)]
            ids = [engine.add_request(p, adapter=a, n=n, max_new_tokens=3) for p, a, n in work]
        answers(engine, [f"{name}__child#1" for name in ids[:2]])
    assert [name[:5] for name in seen.rows if name != "req_2"] == ["req_0"] * 3 + ["req_1"] * 3
    assert seen.most("a1") == 3
    assert seen.counts[0]["running"][SUMS] == 1


def test_without_shares_the_order_is_that_of_arrival(llama, cm, monkeypatch):
    monkeypatch.setattr(Shares, "order", None)
    monkeypatch.setattr(Shares, "advance", None)
    seen = serve(cm, None, [("a1", 20), ("a0", 20)], llama)
    assert [*seen.rows] == [f"req_{i}" for i in range(40)]


def test_an_idle_adapter_saves_nothing_up():
    shares = Shares()
    shares.give("a", Share())
    a, b = ([Asking(name, f"{name}{i}", 2) for i in range(4)] for name in "ab")
    shares.order(a, [])
    shares.advance([("a", 1000)], contended=True)
    assert shares.order(a + b, []) == [0, 4, 1, 5, 2, 6, 3, 7]
    shares.advance([("b", 8)], contended=True)  # while `a` has the step before
    assert shares.order(a + b, [])[:4] == [0, 1, 2, 3]
    shares.advance([("a", 1000)], contended=False)  # nobody waits, so nothing is owed
    assert shares.order(b + a, [])[:2] == [0, 4]


@pytest.mark.parametrize(
    ("shares", "text"),
    [
        *(({"a1": Share(weight=w)}, "'a1' has weight=.*above 0") for w in (0, -1, "3", 10**400)),
        ({None: Share(weight=float("nan"))}, "'__base__' has weight=nan"),
        *(({SUMS: Share(most_running=n)}, f"{SUMS}.*an integer from 1 on") for n in (0, 1.5, True)),
        ({"a1": 3.0}, "share of 'a1' is a lorafx.Share; got 3.0"),
        ({"a9": Share()}, "no adapter named 'a9'"),
        (["a1"], "shares is a mapping"),
    ],
)
def test_bad_shares_are_refused_by_name(cm, shares, text):
    block = cm.continuous_batching(None, CONFIG, shares=shares)
    with pytest.raises(LorafxError, match=text), block:
        pass
