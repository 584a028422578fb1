"""The GPU queue's logic with small real processes: order, resuming, staleness, limits, kills."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "benchmarks"

#: What jobs of these tests do, by name: they find rows and write them as gpu_job.Part does.
BODIES = {
    "quick": "add('one')",
    "second": "add('one'); add('two')",
    "wrong": "add('one'); fail('two', 'Traceback\\nRuntimeError: two is off')",
    "parent": "add('one'); child = subprocess.Popen(['sleep', '60']); add(str(child.pid)); "
    "time.sleep(60)",
}
SCRIPT = """
import json, subprocess, sys, time
from pathlib import Path
from gpu_results import write_json
part, body = Path(sys.argv[1]), sys.argv[2]
found = json.loads(part.read_text())
rows = found["rows"]
def add(key, **more):
    rows.append({"key": key, **more}); write_json(part, found); time.sleep(0.15)
def fail(key, why):
    found["failures"][key] = why; write_json(part, found)
eval(compile(body, "body", "exec"))
found["ended"] = True
found["summary"] = f"{len(rows)} rows"
write_json(part, found)
"""


pytestmark = pytest.mark.usefixtures("bench")


@pytest.fixture
def world(tmp_path: Path) -> Callable[..., Any]:
    """Makes a queue of jobs of BODIES over a repository of a few files and an empty store."""
    import gpu_results
    import gpu_runner
    from gpu_jobs import Job

    root = tmp_path / "root"
    (root / "kernels" / "__pycache__").mkdir(parents=True)
    (root / "kernels" / "a.py").write_text("1")

    def make(*names: str, most: float = 540.0, **more: Any) -> Any:
        options: Any = {"estimate": 0.5, "sources": ("kernels",), "most": most}
        jobs = [Job(name, "tests", "none:none", **options) for name in names]
        return gpu_runner.Queue(
            jobs,
            gpu_results.Store("gpu", tmp_path / "kept", None),
            {"gpu": "test"},
            time.monotonic() + gpu_runner.MARGIN + 60,
            digests=gpu_results.Digests(root),
            environment=lambda cache: {**os.environ, "PYTHONPATH": str(FOLDER)},
            launch=lambda job, part: [sys.executable, "-c", SCRIPT, str(part), BODIES[job.name]],
            **more,
        )

    make.root, make.kept = root, tmp_path / "kept"  # type: ignore[attr-defined]
    return make


def run(queue: Any, tmp_path: Path) -> tuple[list[str], list[str]]:
    """Run the queue: jobs that ran, in order, and jobs that are left."""
    import gpu_report

    started: list[str] = []

    class Told(gpu_report.Teller):
        def ended(self, name: str, entry: dict[str, Any]) -> None:
            started.append(name)

    scratch = tmp_path / "scratch"
    scratch.mkdir(exist_ok=True)
    return started, [job.name for job in queue.run(scratch, Told())]


def kept(world: Any, name: str) -> dict[str, Any]:
    return json.loads((world.kept / "gpu" / "tests.json").read_text())[name]


def is_running(pid: int) -> bool:
    """Whether there is such a process that is more than an entry for its parent to read."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def test_jobs_run_in_order_and_are_not_run_again(world: Any, tmp_path: Path) -> None:
    queue = world("second", "quick", commit="abc")
    assert run(queue, tmp_path) == (["second", "quick"], [])
    entry = kept(world, "second")
    assert [row["key"] for row in entry["rows"]] == ["one", "two"]
    assert (entry["status"], entry["commit"], entry["summary"]) == ("measured", "abc", "2 rows")
    assert entry["machine"] == {"gpu": "test"}
    assert run(world("second", "quick"), tmp_path) == ([], [])
    assert run(world("second", "quick", again=True), tmp_path)[0] == ["second", "quick"]


def test_changed_sources_make_results_stale(world: Any, tmp_path: Path) -> None:
    run(world("quick"), tmp_path)
    (world.root / "kernels" / "__pycache__" / "a.pyc").write_text("no source")
    queue = world("quick")
    assert queue.state(queue.jobs[0]) == "measured"
    (world.root / "kernels" / "a.py").write_text("2")
    queue = world("quick")
    assert queue.state(queue.jobs[0]) == "stale"
    assert run(queue, tmp_path) == (["quick"], [])
    assert len(kept(world, "quick")["rows"]) == 1  # a new run replaces the old rows


def test_failures_go_first_once_mended_and_last_until_then(world: Any, tmp_path: Path) -> None:
    assert run(world("quick", "wrong"), tmp_path)[0] == ["quick", "wrong"]
    entry = kept(world, "wrong")
    assert (entry["status"], entry["why"]) == ("failed", "two: RuntimeError: two is off")
    assert run(world("wrong", "second"), tmp_path)[0] == ["second", "wrong"]
    assert kept(world, "wrong")["attempts"] == 2
    assert run(world("wrong"), tmp_path) == ([], [])  # it has failed twice, and nothing changed
    (world.root / "kernels" / "a.py").write_text("2")
    assert run(world("quick", "second", "wrong"), tmp_path)[0] == ["wrong", "quick", "second"]
    entry = kept(world, "wrong")
    assert (entry["attempts"], entry["before"]) == (1, ["two"])


def test_a_job_is_killed_at_its_limit_with_what_it_started(world: Any, tmp_path: Path) -> None:
    ran = run(world("parent", "quick", most=3.0), tmp_path)[0]
    assert ran == ["parent", "quick", "parent"]
    entry = kept(world, "parent")
    assert (entry["status"], entry["why"]) == ("failed", "killed at its limit of 3 s")
    keys = [row["key"] for row in entry["rows"]]
    assert keys[::2] == ["one", "one"]
    assert not any(is_running(int(child)) for child in keys[1::2])
