"""Job: a test file of tests/gpu, its tests in several processes at once; and their pytest plugin.

Most of a test's time is compilation on the CPU, so lanes share the file: of all tests, those that
failed before at the end, lane k takes every n-th. A test that ends its process (a GPU in error, a
crash, too long a time) is a failure of its own; its lane goes on with the next in a new process.
The plugin writes lines of JSON into a pipe: that a test starts, and what became of it.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest
from gpu_job import KEPT, Context, gpu_error
from gpu_jobs import ROOT

GPU_LOST = 33  # exit status where the GPU takes no more calls; none of pytest's own
TEST_LIMIT = 240  # seconds of one test
ENDED = (0, 1, 5)  # pytest's exit status: all passed, some failed, none to run
ORDER = "LORAFX_GPU_TESTS"
_writing = threading.Lock()


def run_file(context: Context, *, file: str, lanes: int) -> None:
    """The tests that have not passed yet, those that failed before at the end."""
    lanes = 1 if context.tiny else min(lanes, max(1, (os.cpu_count() or 2) // 2))
    earlier = [row["key"] for row in context.rows]
    with ThreadPoolExecutor(lanes) as pool:
        list(pool.map(partial(run_lane, context, file, lanes, earlier), range(lanes)))


def run_lane(context: Context, file: str, lanes: int, earlier: list[str], lane: int) -> None:
    """One pytest process after the other, until none of the lane's tests is left."""
    order = {"lane": lane, "lanes": lanes, "last": context.entry["before"], "done": [*earlier]}
    command = [sys.executable, "-m", "pytest", file, "-p", "gpu_tests", "--tb=short"]
    while True:
        with tempfile.TemporaryDirectory() as folder, open(f"{folder}/log", "w+") as log:
            reader, writer = os.pipe()
            given = {ORDER: json.dumps(order | {"pipe": writer})}
            process = subprocess.Popen(
                [*command, "-p", "no:cacheprovider", f"--basetemp={folder}/tests"],
                cwd=ROOT,
                env=os.environ | given | {"TORCHINDUCTOR_COMPILE_THREADS": "2"},
                stdout=log,
                stderr=subprocess.STDOUT,
                pass_fds=[writer],
            )
            os.close(writer)
            test = ""  # that runs now
            with open(reader) as lines:
                for told in map(json.loads, lines):
                    test = "" if "outcome" in told else told["test"]
                    if not test:
                        order["done"].append(told["test"])
                        with _writing:
                            take_in(context, **told)
            status = process.wait()
            log.seek(0)
            why = f"the process ended with status {status}\n{log.read()[-KEPT // 2 :]}"
        if status in ENDED:
            return
        if test:
            order["done"].append(test)
        if test or status != GPU_LOST:  # whose test has told of it
            with _writing:
                context.fail(test or f"{file}, lane {lane}", why)
            if not test:
                return


def take_in(context: Context, test: str, outcome: str, why: str, seconds: float) -> None:
    """Note what became of a test."""
    if outcome == "failed":
        context.entry["failures"][test] = why
    else:
        context.entry["failures"].pop(test, None)
        context.rows.append({"key": test, "outcome": outcome, "seconds": seconds})
    counted = Counter(row["outcome"] for row in context.rows)
    counted["failed"] = len(context.entry["failures"])
    summary = ", ".join(f"{n} {found}" for found, n in sorted(counted.items()) if n)
    context.write(summary=summary)


# --- the plugin ---

_reports: dict[str, list[pytest.TestReport]] = defaultdict(list)


def _order() -> dict[str, Any]:
    order: dict[str, Any] = json.loads(os.environ[ORDER])
    return order


def _tell(**line: Any) -> None:
    os.write(_order()["pipe"], f"{json.dumps(line)}\n".encode())


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    order = _order()
    ordered = sorted(items, key=lambda item: item.nodeid in order["last"])
    share = ordered[order["lane"] :: order["lanes"]]
    items[:] = [item for item in share if item.nodeid not in order["done"]]


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
    if lost:  # it is blamed, and the process ends: every later test would fail of the same error
        outcome, why = "failed", f"left the GPU in error: {lost}\n{why}"
    seconds = round(time.monotonic() - start, 2)
    _tell(test=item.nodeid, outcome=outcome, why=why[-KEPT:], seconds=seconds)
    if lost:
        os._exit(GPU_LOST)
    return result
