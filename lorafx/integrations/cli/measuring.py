"""Compares the times of several ways, "arms", to compute the same: `lorafx bench`, benchmarks/.

Arms run in one process, interleaved as base, arm, arm, base in blocks of random order. The result
is the median over blocks of the paired ratios, with a bootstrap 95 % interval. The base is also
measured against itself: that interval is the noise floor. A claim should rest on the bound of its
interval, not on the median.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from lorafx.progress import progress

Arm = Callable[[], object]

_RESAMPLES, _LEAST = 2000, 8


@dataclass(frozen=True)
class Ratio:
    """Time of an arm over that of the base, by paired ratios, and the time of a call of the arm."""

    arm: str
    median: float
    low: float
    high: float
    milliseconds: float

    def __str__(self) -> str:
        return f"{self.median:.3f} [{self.low:.3f}, {self.high:.3f}] {self.milliseconds:.2f} ms"


def timed(arm: Arm, seconds: float) -> float:
    """Mean time of one call, over as many calls as fill `seconds` (at least one)."""
    start = time.perf_counter()
    calls = 0
    while True:
        arm()
        calls += 1
        elapsed = time.perf_counter() - start
        if elapsed >= seconds:
            return elapsed / calls


def compare(
    base: Arm,
    arms: Mapping[str, Arm],
    *,
    blocks: int = 20,
    seconds: float = 0.05,
    seed: int = 0,
    timer: Callable[[Arm, float], float] = timed,
    itself: str = "A/A",
    title: str = "arms",
    until: float = 0.0,
) -> list[Ratio]:
    """Paired ratios over the base, of the base (named `itself`) and of every arm.

    `timer(arm, seconds)` returns the seconds of one call, measured for about `seconds`. `title`
    names the comparison in progress messages. Fewer than `blocks` are measured, at least eight,
    once every interval lies within `until` of its median.
    """
    rng = random.Random(seed)
    arms = {itself: base, **arms}
    for number, (name, arm) in enumerate(arms.items(), start=1):
        with progress(f"{title}: first calls, which compile, {number} of {len(arms)}: {name}"):
            for _ in range(3):
                arm()
    pairs: dict[str, list[tuple[float, float]]] = {name: [] for name in arms}
    least = 4 * blocks * len(arms) * seconds
    with progress(f"{title}: measuring {blocks} blocks, for at least {least:.0f} s"):
        for block in range(blocks):
            if until and block and block % _LEAST == 0:
                found = [_ratio(name, pairs[name], rng) for name in arms]
                if all(r.high - r.low <= 2 * until * r.median for r in found):
                    return found
            order = list(arms)
            rng.shuffle(order)
            for name in order:
                arm = arms[name]
                base_time, arm_time = timer(base, seconds), timer(arm, seconds)
                arm_time += timer(arm, seconds)
                pairs[name].append((arm_time / 2, (base_time + timer(base, seconds)) / 2))
    return [_ratio(name, pairs[name], rng) for name in arms]


def _ratio(name: str, pairs: list[tuple[float, float]], rng: random.Random) -> Ratio:
    ratios = [arm / base for arm, base in pairs]
    medians = sorted(
        statistics.median(rng.choices(ratios, k=len(ratios))) for _ in range(_RESAMPLES)
    )
    tail = _RESAMPLES // 40  # 2.5 % on each side
    low, high = medians[tail], medians[-1 - tail]
    milliseconds = statistics.median(arm for arm, _ in pairs) * 1e3
    return Ratio(name, statistics.median(ratios), low, high, milliseconds)
