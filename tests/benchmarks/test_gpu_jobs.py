"""The GPU queue's registry and report, and where its jobs find lorafx."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "benchmarks"

pytestmark = pytest.mark.usefixtures("bench")


def test_the_registry_is_sound() -> None:
    """Names are unique, sources exist, a run fits into nine minutes, results into few files."""
    from gpu_jobs import ARMS, GROUPS, all_jobs, arm_named
    from gpu_results import Digests, source_files

    jobs = all_jobs()
    names = [job.name for job in jobs]
    assert len(set(names)) == len(names)
    assert len({arm.name for arm in ARMS}) == len(ARMS)
    digests = Digests()
    for place, job in enumerate(jobs):
        assert job.group in GROUPS
        assert job.estimate <= job.most <= 540
        assert source_files(job.sources)
        assert digests.of(job, {}) == digests.of(job, {})
        earlier = names[:place]
        assert set(job.inputs) <= set(earlier), job.name
        if "arm" in job.arguments:
            arm = arm_named(str(job.arguments["arm"]))
            assert (job.group in arm.phases, job.inputs) == (True, arm.inputs)
        module, _, function = job.run.partition(":")
        assert f"\ndef {function}(" in (FOLDER / f"{module}.py").read_text(), job.run
    from lorafx.kernels.cost.roofline import GPU_STRATEGIES

    measured = {arm.arguments.get("name") for arm in ARMS}
    # One of batches so small that it is not among the mixes; the jobs of correctness have it.
    assert set(GPU_STRATEGIES) <= measured
    assert len(GROUPS) <= 8
    files = {path.name for path in (ROOT / "tests" / "gpu").glob("test_*.py")}
    assert files == {name.partition(": ")[2] for name in names if name.startswith("tests: ")}


def test_the_report_needs_no_torch_and_says_what_is_to_do(tmp_path: Path) -> None:
    """As anybody runs it: by the interpreter alone, no package installed."""
    command = [sys.executable, "-S", str(FOLDER / "gpu_queue.py"), "--report"]
    done = subprocess.run([*command, "--only", "prefill main"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "prefill main: segments" in done.stdout
