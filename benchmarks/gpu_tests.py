"""Job: a test file of tests/gpu, its tests in several processes at once; and their pytest plugin.

Most of a test's time is compilation on the CPU, so lanes share the file. A test that ends its
process (a GPU in error, a crash, too long a time) is a failure of its own; its lane goes on with
the next test in a new process. Every outcome is on disk at once.

    LORAFX_GPU_TESTS = {"lane": k, "lanes": n, "last": [ids], "done": [ids], "report": file}

Of all tests, those of `last` at the end, lane k takes every n-th, but those `done`. The report has
lines of JSON: that a test starts, and what became of it. A test that leaves the GPU in error is
blamed for it, and the process ends: every later test would fail of the same error.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import pytest
from gpu_job import GPU_LOST, KEPT, Context, gpu_error
from gpu_jobs import ROOT

TEST_LIMIT = 240  # seconds of one test
ENDED = (0, 1, 5)  # pytest's exit status: all passed, some failed, none to run
ORDER = "LORAFX_GPU_TESTS"


def run_file(context: Context, *, file: str, lanes: int) -> None:
    """The tests that have not passed yet, those that failed before at the end."""
    lanes = 1 if context.tiny else min(lanes, max(1, (os.cpu_count() or 2) // 2))
    with tempfile.TemporaryDirectory() as folder:
        running = [run_lane(context, file, lane, lanes, Path(folder)) for lane in range(lanes)]
        while running:
            running = [lane for lane in running if next(lane, False)]
            time.sleep(0.1)


def run_lane(
    context: Context, file: str, lane: int, lanes: int, folder: Path
) -> Generator[bool, None, None]:
    """One pytest process after the other, until none of the lane's tests is left."""
    order: dict[str, Any] = {"lane": lane, "lanes": lanes, "last": context.entry["before"]}
    done = {row["key"] for row in context.rows}
    command = [sys.executable, "-m", "pytest", file, "-p", "gpu_tests", "--tb=short"]
    command += ["-p", "no:cacheprovider", f"--basetemp={folder}/tmp{lane}"]
    report, log = folder / f"report{lane}", folder / f"log{lane}"
    order["report"] = str(report)
    while True:
        order["done"], test, status = sorted(done), "", None
        given = {ORDER: json.dumps(order), "TORCHINDUCTOR_COMPILE_THREADS": "2"}
        report.write_text("")
        read = 0
        with log.open("wb") as output:
            process = subprocess.Popen(
                command, cwd=ROOT, env=os.environ | given, stdout=output, stderr=subprocess.STDOUT
            )
            while status is None:
                yield True
                status = process.poll()  # before the report is read: what it says then is all
                fresh = report.read_text().split("\n")[read:-1]  # whole lines
                read += len(fresh)
                for line in fresh:
                    test = take_in(context, done, json.loads(line))
        if status in ENDED:
            return
        why = f"the process ended with status {status}\n"
        why += log.read_text(errors="replace")[-KEPT // 2 :]
        if test:
            context.fail(test, why)
            done.add(test)
        elif status != GPU_LOST:  # whose test has told of it
            context.fail(f"{file}, lane {lane}", why)
            return


def take_in(context: Context, done: set[str], told: dict[str, Any]) -> str:
    """Note what the report says; the test that runs now."""
    test: str = told.pop("test")
    if not told:
        return test
    done.add(test)
    why = told.pop("why")
    if told["outcome"] == "failed":
        context.fail(test, why)
    else:
        context.add(test, [told])
    counted = Counter(row["outcome"] for row in context.rows)
    counted["failed"] = len(context.entry["failures"])
    found = sorted(counted.items())
    context.summarise(", ".join(f"{count} {outcome}" for outcome, count in found if count))
    return ""


# --- the plugin ---

_reports: dict[str, list[pytest.TestReport]] = defaultdict(list)


def _tell(**line: Any) -> None:
    with Path(json.loads(os.environ[ORDER])["report"]).open("a") as file:
        file.write(json.dumps(line) + "\n")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item], config: pytest.Config) -> None:
    order = json.loads(os.environ[ORDER])
    ordered = sorted(items, key=lambda item: item.nodeid in order["last"])
    share = ordered[order["lane"] :: order["lanes"]]
    chosen = [item for item in share if item.nodeid not in order["done"]]
    config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
    items[:] = chosen


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    _reports[report.nodeid].append(report)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    start = time.monotonic()
    _tell(test=item.nodeid)
    signal.alarm(TEST_LIMIT)  # which ends the process
    result = yield
    signal.alarm(0)
    # Of set-up, call and end, the one that decides: failed before skipped before passed.
    report = min(_reports.pop(item.nodeid), key=lambda r: (not r.failed, not r.skipped))
    outcome, why, lost = report.outcome, report.longreprtext, gpu_error()
    if lost:
        outcome, why = "failed", f"left the GPU in error: {lost}\n{why}"
    seconds = round(time.monotonic() - start, 2)
    _tell(test=item.nodeid, outcome=outcome, why=why[-KEPT:], seconds=seconds)
    if lost:
        os._exit(GPU_LOST)
    return result
