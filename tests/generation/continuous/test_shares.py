"""Shares of an engine's adapters: tokens by weight while requests wait, and bounds of what runs."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
from step_logits import StepLogits, answers, check_logits
from transformers.generation.configuration_utils import ContinuousBatchingConfig

from lorafx import ConfigError, Share, UnknownAdapterError
from lorafx.adapter_store.names import BASE, SUMS
from lorafx.generation.continuous.adapter_requests import account_of
from lorafx.generation.continuous.shares import Asking, Shares

pytestmark = pytest.mark.usefixtures("earlier_objects_frozen")

CONFIG = ContinuousBatchingConfig(
    page_size=4, num_blocks=512, max_batch_tokens=48, max_requests_per_batch=8
)


class Watched(StepLogits):
    """Also keeps what each step has run, and who waits behind it, by adapter."""

    def __init__(self, engine: Any) -> None:
        super().__init__(engine)
        self.tokens: list[Counter[str]] = []
        self.running: list[Counter[str]] = []
        self.waiting: list[Counter[str]] = []
        self.order: list[str] = []  # of first steps

    def __call__(self, **batch: Any) -> Any:
        step = self.engine._requests_of_step()
        self.order += [f.state.request_id for f in step if f.state.request_id not in self.order]
        ran: Counter[str] = Counter()
        for future in step:
            ran[account_of(future.state)] += future.query_length
        self.tokens.append(ran)
        for state, sequences in self.engine.sequences().items():
            getattr(self, state).append(Counter(map(account_of, sequences)))
        return super().__call__(**batch)

    def while_waiting(self, *accounts: str) -> Counter[str]:
        """The tokens of the steps behind which all of these wait."""
        pairs = zip(self.tokens, self.waiting, strict=True)
        return sum((t for t, w in pairs if all(w[a] for a in accounts)), Counter())


def add(engine: Any, count: int, adapter: str | None, seed: int = 0, **others: Any) -> list[str]:
    draw = random.Random(seed)
    return [
        engine.add_request(
            [draw.randrange(3, 61) for _ in range(draw.randrange(2, 7))],
            adapter=adapter,
            **{"max_new_tokens": draw.randrange(2, 7), **others},
        )
        for _ in range(count)
    ]


def serve(cm: Any, shares: Any, work: Sequence[tuple[str | None, int]], case: Any) -> Watched:
    """So many requests of each adapter, added at once; all answers are those of dense merge."""
    with cm.continuous_batching(None, CONFIG, warmup=False, shares=shares) as engine:
        seen, adapters = Watched(engine), {}
        with engine.pause():
            for seed, (adapter, count) in enumerate(work):
                adapters |= dict.fromkeys(add(engine, count, adapter, seed), adapter)
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
    tokens = seen.while_waiting(first, second)
    assert tokens.total() > 200
    assert tokens[second] / tokens[first] == pytest.approx(ratio, rel=0.15)


def test_more_adapters_than_slots_with_shares(llama, with_slots):
    shares = {"a0": Share(weight=100.0), "a1": Share(most_running=1)}
    seen = serve(with_slots(2), shares, [(f"a{i}", 6) for i in range(4)], llama)
    assert max(running["a1"] for running in seen.running) == 1


def test_a_bound_holds_for_all_versions_and_holds_nobody_up(llama, cm):
    with cm.continuous_batching(None, CONFIG, warmup=False) as engine:
        engine.set_share("a1", Share(most_running=2))
        seen = Watched(engine)
        with engine.pause():
            adapters = dict.fromkeys(add(engine, 6, "a1"), "a1")
            cm.load_adapter(llama.folders["a2"], "a1")
            adapters |= dict.fromkeys(add(engine, 6, "a1"), "a2")
            others = add(engine, 4, "a0") + add(engine, 2, None, max_new_tokens=9)
            adapters |= dict(zip(others, ["a0"] * 4 + [None] * 2, strict=True))
        check_logits(llama, seen, answers(engine, [*adapters]), adapters)
    assert max(running["a1"] for running in seen.running) == 2
    assert {*others} <= {*seen.order[:8]}


def test_sequences_of_one_request_count_once(cm):
    shares = {"a1": Share(most_running=1)}
    with cm.continuous_batching(None, CONFIG, warmup=False, shares=shares) as engine:
        seen = Watched(engine)
        with engine.pause():
            ids = [
                engine.add_request(p, adapter="a1", n=3, max_new_tokens=3) for p in ([5, 6], [7])
            ]
            ids += [engine.add_request([8, 9], adapter={"a1": 0.5}, max_new_tokens=3)]
        outputs = answers(engine, [*(f"{i}__child#{c}" for i in ids[:2] for c in (0, 1)), *ids])
    assert not any(output.error for output in outputs.values())
    assert max(running["a1"] for running in seen.running) == 3
    assert seen.running[0][SUMS] == 1
    first, second = ([s for s, name in enumerate(seen.rows) if ids[i] in name] for i in (0, 1))
    assert max(first) < min(second)


def test_without_shares_the_order_is_that_of_arrival(llama, cm, monkeypatch):
    monkeypatch.setattr(Shares, "order", None)
    monkeypatch.setattr(Shares, "advance", None)
    seen = serve(cm, None, [("a1", 20), ("a0", 20)], llama)
    assert seen.order == [f"req_{i}" for i in range(40)]


def test_an_idle_adapter_saves_nothing_up():
    shares = Shares()
    shares.give("a", Share())
    a, b = [Asking("a", f"a{i}", 2) for i in range(4)], [Asking("b", f"b{i}", 2) for i in range(4)]
    shares.order(a, [])
    shares.advance([("a", 1000)], contended=True)
    assert shares.order(a + b, []) == [0, 4, 1, 5, 2, 6, 3, 7]
    shares.advance([("b", 8)], contended=True)  # while `a` has the step before
    assert shares.order(a + b, [])[:4] == [0, 1, 2, 3]
    shares.advance([("a", 1000)], contended=False)  # nobody waits, so nothing is owed
    assert shares.order(b + a, [])[:2] == [0, 4]


@pytest.mark.parametrize(
    ("name", "share", "text"),
    [
        *(
            ("a1", Share(weight=w), "'a1' has weight=.*above 0")
            for w in (0, -1, "3", True, 10**400)
        ),
        (None, Share(weight=float("nan")), "'__base__' has weight=nan"),
        *((SUMS, Share(most_running=n), f"{SUMS}.*integer from 1 on") for n in (0, 1.5, True)),
        ("a1", 3.0, "share of 'a1' is a lorafx.Share; got 3.0"),
        ("", Share(), "an adapter's name is"),
    ],
)
def test_bad_shares_are_refused_by_name(name, share, text):
    with pytest.raises(ConfigError, match=text):
        Shares().give(name, share)


def test_shares_of_adapters_that_are_not_loaded(cm):
    with (
        pytest.raises(UnknownAdapterError, match="'a9'"),
        cm.continuous_batching(None, CONFIG, shares={"a9": Share()}),
    ):
        pass
    with (
        pytest.raises(ConfigError, match="shares is a mapping"),
        cm.continuous_batching(None, CONFIG, shares=["a1"]),
    ):
        pass
