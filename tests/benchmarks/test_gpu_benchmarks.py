"""What the GPU benchmarks do without a GPU: arms that are right, refusals, workloads, what a job
that is cut off leaves, the queue's registry and report."""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.usefixtures("bench")
CPU = torch.device("cpu")
ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "benchmarks"


@pytest.mark.slow
def test_every_arm_is_right_and_measured() -> None:
    import gpu_linear
    from gpu_protocol import Meter

    for arm in gpu_linear.ARMS:
        for phase in arm.phases:
            [case] = gpu_linear.cases(phase, tiny=True)
            rows = gpu_linear.measure(case, arm, Meter(CPU))
            assert [row["arm"] for row in rows] == ["A/A", arm.name]
            assert rows[-1]["error"] < gpu_linear.TOLERANCE


@pytest.mark.quick
def test_a_wrong_arm_is_not_measured() -> None:
    import gpu_linear

    [case], plan = gpu_linear.cases("decode", tiny=True), gpu_linear.ARMS[0]
    with pytest.raises(RuntimeError, match=r"tiny .* plan is off by"):
        gpu_linear.check(case, plan, case.copy(CPU), lambda c: partial(gpu_linear.base_of, c))


@pytest.mark.quick
@pytest.mark.parametrize(("noise", "blocks"), [(0.0, 8), (0.1, 20)])
def test_blocks_end_once_intervals_are_narrow(noise: float, blocks: int) -> None:
    from protocol import compare

    count = itertools.count()
    timer = lambda arm, seconds: 1 + noise * (next(count) % 3)  # noqa: E731
    compare(lambda: None, {"arm": lambda: None}, blocks=20, timer=timer, until=0.005)
    assert next(count) == blocks * 2 * 4


@pytest.mark.quick
def test_without_a_gpu_the_queue_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import gpu_queue

    monkeypatch.setattr(gpu_queue, "DEVICE", "raise RuntimeError('Found no NVIDIA driver')")
    with pytest.raises(SystemExit, match=r"gpu_queue.py measures on a GPU.*Found no NVIDIA"):
        gpu_queue.main(["--out", str(tmp_path / "out")])
    assert not list(tmp_path.iterdir())


@pytest.mark.quick
def test_workloads_are_those_of_the_model() -> None:
    from gpu_linear import MIXES, SLOTS, cases, chosen

    from lorafx.kernels.cost.roofline import GPU_STRATEGIES

    for phase in MIXES:
        found = cases(phase)
        for case in found:
            assert case.distinct <= SLOTS
            assert case.work(CPU).floor() >= case.work(CPU).base(), case.label
            assert chosen(case, CPU) in GPU_STRATEGIES
        shapes = [(c.in_features, sum(c.sizes)) for c in found]
        assert shapes == [(4096, 6144), (4096, 4096), (4096, 28672), (14336, 4096)]


def test_the_registry_is_sound() -> None:
    """Names are unique, sources exist, the first jobs fit into eight minutes, results are few."""
    from gpu_jobs import LIMIT, all_jobs
    from gpu_linear import ARMS
    from gpu_results import digest_of

    jobs = all_jobs()
    assert len(names := {job.name for job in jobs}) == len(jobs)
    assert sum(job.estimate for job in jobs[:5]) < 480
    for job in jobs:
        assert job.estimate <= LIMIT
        assert digest_of(job)
        module, _, function = job.run.partition(":")
        assert f"\ndef {function}(" in (FOLDER / f"{module}.py").read_text(), job.run
    from lorafx.kernels.cost.roofline import GPU_STRATEGIES

    assert set(GPU_STRATEGIES) <= {arm.name for arm in ARMS}
    assert len({job.group for job in jobs}) <= 8
    files = {path.name for path in (ROOT / "tests" / "gpu").glob("test_*.py")}
    assert files == {name.partition(": ")[2] for name in names if name.startswith("tests: ")}


def test_the_report_needs_no_torch_and_says_what_is_to_do(tmp_path: Path) -> None:
    """As anybody runs it: by the interpreter alone, no package installed."""
    command = [sys.executable, "-S", str(FOLDER / "gpu_queue.py"), "--report"]
    done = subprocess.run([*command, "--only", "linears"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "linears: prefill" in done.stdout


#: A job that finds one row, and then does what `end` says.
JOB = """
import os, sys, time; from pathlib import Path; sys.path.insert(0, {folder!r})
from gpu_results import Store
store = Store("none-torch1.0", Path({out!r})); entry = store.entries["job"]
entry["rows"].append({{"key": "first"}}); entry["date"] += "1"
entry["failures"]["second"] = "the process ended in this case"; store.put("steps", "job", entry)
{end}; store.put("steps", "job", entry)
"""


@pytest.mark.parametrize(
    ("end", "limit", "status", "why"),
    [
        ("time.sleep(60)", 3.0, "partial", "ended at the queue's limit of"),
        ("os._exit(3)", 30.0, "failed", "second: .*; 1 in all; the process ended with status 3"),
        ('entry |= {"failures": {}, "ended": True}', 30.0, "measured", ""),
    ],
)
def test_what_a_job_has_found_is_kept_however_it_ends(
    end: str, limit: float, status: str, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import gpu_queue
    from gpu_jobs import Job

    out = tmp_path / "out"
    (tmp_path / "gpu_job.py").write_text(JOB.format(folder=str(FOLDER), out=str(out), end=end))
    (tmp_path / "scratch").mkdir()
    here = {"FOLDER": tmp_path, "DEVICE": "print('None', '1.0.0', sep='\\n')", "MARGIN": 0.0}
    for name, value in here.items():
        monkeypatch.setattr(gpu_queue, name, value)
    options = argparse.Namespace(limit=limit, out=out, commit="", self_check=False)
    job = Job("job", "steps", "none:none", {}, ("Makefile",), 1.0)
    entry = gpu_queue.Queue([job], options, tmp_path / "scratch").run_job(job)
    assert entry == json.loads((out / "none-torch1.0" / "steps.json").read_text())["job"]
    assert (entry["status"], entry["rows"]) == (status, [{"key": "first"}])
    assert re.match(why, entry.get("why", ""))
    again = gpu_queue.seed(entry, entry["sources"])
    assert bool(again["rows"]) == (status != "measured")  # what is measured is measured anew
    assert again["before"] == (["second"] if status == "failed" else [])


#: A file of tests, one of which ends its process, and one leaves the GPU in error.
TESTS = """import gpu_tests, os, pytest
def test_a(): os._exit(7)
def test_b(): assert 0
def test_c(): pytest.skip("not here")
def test_d(): gpu_tests.gpu_error = lambda: "an illegal address"
def test_e(): pass
"""
RUN = """import json, pathlib, sys, gpu_tests
from gpu_job import Context

entry = {"rows": [], "failures": {}, "before": []}
gpu_tests.run_file(Context(entry, lambda: None, tiny=True), file=sys.argv[1], workers=2)
pathlib.Path(sys.argv[2]).write_text(json.dumps(entry))
"""


@pytest.mark.slow
def test_a_test_that_ends_its_process_costs_no_other(tmp_path: Path) -> None:
    """In a process of its own, as jobs are: workers that start workers may do so for ever."""
    file, result = tmp_path / "test_four.py", tmp_path / "entry.json"
    file.write_text(TESTS)
    variables = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    subprocess.run(
        [sys.executable, "-c", RUN, str(file), str(result)],
        env=variables | {"PYTHONPATH": f"{FOLDER}:{ROOT}"},
        check=True,
        timeout=600,
    )
    entry = json.loads(result.read_text())
    found = {row["key"][-1]: row["outcome"] for row in entry["rows"]}
    assert found == {"c": "skipped", "e": "passed"}
    why = {key[-1]: text for key, text in entry["failures"].items()}
    assert "crashed while running" in why["a"]
    assert "assert 0" in why["b"]
    assert why["d"] == "left the GPU in error: an illegal address"
    assert entry["summary"] == "3 failed, 1 passed, 1 skipped"
