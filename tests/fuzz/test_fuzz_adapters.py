"""Two minutes of `fuzz_adapters`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("atheris")
SCRIPT = Path(__file__).with_name("fuzz_adapters.py")


@pytest.mark.slow
def test_two_minutes_of_any_files(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, SCRIPT, "-max_total_time=120", "-print_final_stats=1"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    runs = next(line for line in done.stderr.splitlines() if "number_of_executed_units" in line)
    assert int(runs.split()[-1]) > 1_000
