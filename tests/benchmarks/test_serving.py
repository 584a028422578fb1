"""What benchmarks/serving.py feeds an engine with, and that it counts what comes out."""

from __future__ import annotations

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
