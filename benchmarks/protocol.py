"""The measuring protocol that all benchmarks share.

One process. Arms run interleaved as A B B A in blocks of random order; a block gives each arm two
times, whose mean is paired with the base arm's of the same block. Reported is the median of the
paired ratios with a bootstrap 95 % interval. The base arm is also measured against itself (A/A):
that interval is the noise floor. A claim needs the bound of its interval, not the median.
"""

from __future__ import annotations

import json
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import date
from importlib import metadata
from pathlib import Path

import torch

Arm = Callable[[], object]


@dataclass(frozen=True)
class Ratio:
    """Time of an arm over time of the base arm: median and 95 % interval of paired ratios."""

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
    arms: dict[str, Arm],
    *,
    blocks: int = 20,
    seconds: float = 0.05,
    seed: int = 0,
    timer: Callable[[Arm, float], float] = timed,
) -> list[Ratio]:
    """Paired ratios of every arm, and of the base against itself ("A/A"), over the base.

    `timer` gives the seconds of one call of an arm, measured for about that long.
    """
    rng = random.Random(seed)
    everything = {"A/A": base, **arms}
    for arm in everything.values():  # compile and warm up
        for _ in range(3):
            arm()
    pairs: dict[str, list[tuple[float, float]]] = {name: [] for name in everything}
    for _ in range(blocks):
        order = list(everything)
        rng.shuffle(order)
        for name in order:
            first, arm = timer(base, seconds), everything[name]
            both = timer(arm, seconds) + timer(arm, seconds)
            pairs[name].append((both / 2, (first + timer(base, seconds)) / 2))
    return [_ratio(name, pairs[name], rng) for name in everything]


def _ratio(name: str, pairs: list[tuple[float, float]], rng: random.Random) -> Ratio:
    ratios = [arm / base for arm, base in pairs]
    medians = sorted(statistics.median(rng.choices(ratios, k=len(ratios))) for _ in range(2000))
    time_ms = statistics.median(arm for arm, _ in pairs) * 1e3
    return Ratio(name, statistics.median(ratios), medians[49], medians[1949], time_ms)


def machine() -> dict[str, object]:
    """What the figures were measured on."""
    packages = ("torch", "transformers", "peft")
    return {
        "date": date.today().isoformat(),
        "cpu": _cpu_name(),
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in packages},
    }


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()


def save(
    path: Path,
    title: str,
    rows: list[dict[str, object]],
    machine_of: Callable[[], dict[str, object]] = machine,
) -> None:
    """Write results with the machine that they were measured on."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"title": title, "machine": machine_of(), "rows": rows}, indent=1))
    print(f"wrote {path}", file=sys.stderr)


def as_row(case: str, ratio: Ratio) -> dict[str, object]:
    return {"case": case, **asdict(ratio)}
