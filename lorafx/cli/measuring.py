"""Times of several ways to compute the same, side by side.

One process; arms interleaved as base, arm, arm, base in blocks of random order. Reported is the
median of the paired ratios with a bootstrap 95 % interval. The base measured against itself gives
the noise floor.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

Arm = Callable[[], object]

_RESAMPLES = 2000


@dataclass(frozen=True)
class Measured:
    """An arm: milliseconds of a call, and its time over that of the base."""

    arm: str
    milliseconds: float
    ratio: float
    low: float
    high: float


def measured(
    base: Arm, arms: Mapping[str, Arm], *, blocks: int, seconds: float, wait: Arm | None = None
) -> list[Measured]:
    """Every arm, and the base against itself ("base"). `wait` ends what a device still does."""
    dice = random.Random(0)
    every = {"base": base, **arms}
    for arm in every.values():  # compiles
        for _ in range(3):
            arm()
    pairs: dict[str, list[tuple[float, float]]] = {name: [] for name in every}
    for _ in range(blocks):
        order = list(every)
        dice.shuffle(order)
        for name in order:
            first, arm = _timed(base, seconds, wait), every[name]
            both = _timed(arm, seconds, wait) + _timed(arm, seconds, wait)
            pairs[name].append((both / 2, (first + _timed(base, seconds, wait)) / 2))
    return [_summary(name, pairs[name], dice) for name in every]


def _timed(arm: Arm, seconds: float, wait: Arm | None) -> float:
    """Mean time of one call, over as many calls as fill `seconds`."""
    start, calls = time.perf_counter(), 0
    while True:
        arm()
        if wait is not None:
            wait()
        calls += 1
        elapsed = time.perf_counter() - start
        if elapsed >= seconds:
            return elapsed / calls


def _summary(name: str, pairs: list[tuple[float, float]], dice: random.Random) -> Measured:
    ratios = [arm / base for arm, base in pairs]
    medians = sorted(
        statistics.median(dice.choices(ratios, k=len(ratios))) for _ in range(_RESAMPLES)
    )
    low, high = medians[_RESAMPLES // 40], medians[-_RESAMPLES // 40]
    time_ms = statistics.median(arm for arm, _ in pairs) * 1e3
    return Measured(name, time_ms, statistics.median(ratios), low, high)
