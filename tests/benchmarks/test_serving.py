"""What benchmarks/serving.py feeds an engine with, and that it counts what comes out."""

from __future__ import annotations

import types
from collections import Counter

import pytest

pytestmark = [pytest.mark.usefixtures("bench"), pytest.mark.quick]


def test_arrivals_and_adapters() -> None:
    import serving

    work = serving.requests(2000, rate=50.0)
    assert work == serving.requests(2000, rate=50.0)
    assert work[-1].arrives == pytest.approx(2000 / 50, rel=0.1)
    counts = Counter(serving.adapter_of(request, 8) for request in work)
    assert set(counts) == {f"a{k}" for k in range(8)}
    assert counts["a0"] / counts["a1"] == pytest.approx(2, rel=0.25)
    assert counts["a0"] / counts["a7"] == pytest.approx(8, rel=0.4)
    assert {serving.adapter_of(request, 0) for request in work} == {None}


class Engine:
    """Answers each request at once, with as many tokens as were asked for."""

    def __init__(self) -> None:
        self.adapters: list[str | None] = []
        self.done: list[types.SimpleNamespace] = []

    def add_request(self, prompt, *, max_new_tokens, record_timestamps, adapter):
        assert record_timestamps
        self.adapters.append(adapter)
        tokens = [1] * max_new_tokens
        self.done.append(
            types.SimpleNamespace(
                is_finished=lambda: True,
                error=None,
                generated_tokens=tokens,
                timestamps=[0.25],
                created_time=0.0,
            )
        )

    def get_result(self, timeout):
        return self.done.pop() if self.done else None


def test_an_engine_is_fed_and_its_tokens_are_counted() -> None:
    import serving

    engine, work = Engine(), serving.requests(6, rate=1000.0)
    outcome = serving.run_engine(engine, work, new=3, adapters=2)
    assert engine.adapters == [serving.adapter_of(request, 2) for request in work]
    assert outcome.first == 0.25
    assert outcome.tokens > 18 / 5
    row = serving.row(
        "a",
        {
            "a": [serving.Outcome(3.0, 1.0), serving.Outcome(5.0, 1.0)],
            "transformers": [serving.Outcome(2.0, 1.0)] * 2,
            "lorafx, 0 adapters": [serving.Outcome(4.0, 1.0)] * 2,
        },
    )
    assert row["tokens over transformers"] == [2.0, 1.5, 2.5]
    assert row["tokens over lorafx, 0 adapters"] == [1.0, 0.75, 1.25]
