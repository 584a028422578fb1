"""The soak (benchmarks/soak.py), in a process of its own."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]


@pytest.mark.parametrize(
    ("seconds", "lowering"), [(6, "reference"), (600, "reference"), (120, "inductor")]
)
@pytest.mark.slow
def test_soak(seconds: int, lowering: str) -> None:
    """`LORAFX_SOAK_SECONDS` is the duration of each, where it is set."""
    seconds = int(os.environ.get("LORAFX_SOAK_SECONDS", seconds))
    paths = [str(TESTS / folder) for folder in ("helpers", "conformance")]
    # Few arenas: a thread's freed memory would stand in its own, and look like a leak.
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "MALLOC_ARENA_MAX": "2"}
    done = subprocess.run(
        [sys.executable, str(TESTS.parent / "benchmarks" / "soak.py"), str(seconds), lowering],
        env={**env, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-12000:]
    found = ast.literal_eval(done.stdout.strip().splitlines()[-1])
    print(found)
    warm, end = found["warm"], found["end"]
    # Dynamo takes a guard that an interrupt hits for one that fails, and captures once more.
    added = end["graphs"] - warm["graphs"]
    assert 0 <= added <= 1 + found["interrupts"] // 40
    assert end["adapters"] <= warm["adapters"] + 2
    assert end["tensors"] <= warm["tensors"] + 100 + 500 * added
    assert end["MiB"] <= warm["MiB"] + 40
    assert found["interrupts"] > 0
    assert found["call"] > 0
