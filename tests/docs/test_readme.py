"""README.md is short, and its numbers are those of the committed results."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.quick

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
README = (ROOT / "README.md").read_text()


def medians(rows: list[dict[str, Any]], arm: str) -> list[float]:
    return [row["median"] for row in rows if row["arm"] == arm]


def test_it_takes_five_minutes() -> None:
    assert len(README.split()) <= 900


def test_the_numbers_on_a_cpu() -> None:
    rows = json.loads((RESULTS / "cpu_mixed.json").read_text())["rows"]
    ours, peft = (medians(rows, arm) for arm in ("lorafx D=8", "PEFT mixed, eager, D=8"))
    written = (
        f"takes {min(ours):.2f} to {max(ours):.2f} times as long as the compiled base, "
        f"PEFT's {min(peft):.1f} to {max(peft):.1f} times"
    )
    assert written in README


def test_the_numbers_on_a_gpu() -> None:
    (steps,) = RESULTS.glob("gpu/*/steps.json")
    rows = json.loads(steps.read_text())["step: decode [64, 1]"]["rows"]
    by_adapters = {row["arm"]: f"{row['median']:.2f}" for row in rows}
    said = re.search(r"step takes ([\d.]+) with one adapter and ([\d.]+) with 32", README)
    assert said is not None
    assert list(said.groups()) == [by_adapters["lorafx D=1"], by_adapters["lorafx D=32"]]
