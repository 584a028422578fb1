"""The soaks (benchmarks/soak.py, soak_starts.py), each in a process of its own."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]


def soak(script: str, *arguments: object, **variables: str) -> str:
    """What a soak says at its end; it has found nothing wrong."""
    paths = [str(TESTS / folder) for folder in ("helpers", "conformance")]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), **variables}
    done = subprocess.run(
        [sys.executable, str(TESTS.parent / "benchmarks" / script), *map(str, arguments)],
        env={**env, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-12000:]
    return done.stdout.strip().splitlines()[-1]


@pytest.mark.parametrize(
    ("seconds", "lowering"), [(6, "reference"), (600, "reference"), (120, "inductor")]
)
@pytest.mark.slow
def test_soak(seconds: int, lowering: str) -> None:
    """`LORAFX_SOAK_SECONDS` is the duration of each, where it is set."""
    seconds = int(os.environ.get("LORAFX_SOAK_SECONDS", seconds))
    # Few arenas: a thread's freed memory would stand in its own, and look like a leak.
    found = ast.literal_eval(soak("soak.py", seconds, lowering, MALLOC_ARENA_MAX="2"))
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


@pytest.mark.skipif(sys.platform != "linux", reason="no process is forked elsewhere")
@pytest.mark.parametrize(("starts", "lowering"), [(4, "reference"), (200, "reference")])
@pytest.mark.slow
def test_starts(starts: int, lowering: str) -> None:
    found = ast.literal_eval(soak("soak_starts.py", starts, lowering).partition(": ")[2])
    assert found["wrong answers"] == found["orphans"] == found["broken files"] == 0
    assert found["eager answers"] > 0
    assert found["interrupts"] > 0
