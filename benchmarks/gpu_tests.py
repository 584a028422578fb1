"""Job: a test file of tests/gpu, by pytest-xdist; and the plugin of its worker processes.

Most of a test's time is compilation on the CPU, so workers share the file. A test that ends its
process (a GPU in error, a crash, too long a time) is a failure of its own; xdist goes on with the
next in a new process. Tests that failed in an earlier run come last.
"""

from __future__ import annotations

import json
import os
import signal
from collections import Counter, defaultdict
from collections.abc import Iterator
from unittest import mock

import pytest
from gpu_job import Context, gpu_error
from gpu_jobs import ROOT

TEST_LIMIT = 240  # seconds of one test
ENDED = (0, 1, 5)  # pytest's exit status: all passed, some failed, none to run
ORDER = "LORAFX_GPU_TESTS"  # what workers are told: tests that are done, tests that come last


def run_file(context: Context, *, file: str, workers: int) -> None:
    """The tests that have not passed yet."""
    workers = 1 if context.tiny else min(workers, max(1, (os.cpu_count() or 2) // 2))
    order = {"done": [row["key"] for row in context.rows], "last": context.entry["before"]}
    told = {ORDER: json.dumps(order), "TORCHINDUCTOR_COMPILE_THREADS": "2"}
    options = [f"--rootdir={ROOT}", "--tb=short", "-pgpu_tests", "-pno:cacheprovider"]
    options += [f"-n{workers}", "--max-worker-restart=20", file]
    with mock.patch.dict(os.environ, told):
        status = pytest.main(options, [Recorder(context)])
    if status not in ENDED:
        context.fail(file, f"pytest ended with status {status}")


class Recorder:
    """Notes what becomes of each test, in the process that gives tests to workers."""

    def __init__(self, context: Context) -> None:
        self.context = context
        self.reports: dict[str, list[pytest.TestReport]] = defaultdict(list)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.context.fail(report.nodeid, str(report.longrepr))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        test, rows, failures = report.nodeid, self.context.rows, self.context.entry["failures"]
        self.reports[test].append(report)
        if report.when in ("setup", "call"):  # "teardown" follows, or that the process ended
            return
        # The one that decides: failed before skipped before passed.
        found = min(self.reports[test], key=lambda r: (not r.failed, not r.skipped))
        seconds = round(sum(each.duration for each in self.reports[test]), 2)
        if not found.failed:
            rows.append({"key": test, "outcome": found.outcome, "seconds": seconds})
        elif test not in failures:  # the end of a process that its test has told of says nothing
            self.context.fail(test, str(found.longrepr))
        counted = Counter(row["outcome"] for row in rows) + Counter(failed=len(failures))
        self.context.write(summary=", ".join(f"{n} {what}" for what, n in sorted(counted.items())))


# --- in a worker ---


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    order = json.loads(os.environ[ORDER])
    left = [item for item in items if item.nodeid not in order["done"]]
    items[:] = sorted(left, key=lambda item: item.nodeid in order["last"])


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(call: pytest.CallInfo[None]) -> Iterator[None]:
    report = yield
    lost = gpu_error() if call.when == "teardown" else ""
    if lost:
        report.outcome, report.longrepr = "failed", f"left the GPU in error: {lost}"
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol() -> Iterator[None]:
    signal.alarm(TEST_LIMIT)  # which ends the process
    result = yield
    signal.alarm(0)
    if gpu_error():  # every later test would fail of it
        os._exit(1)
    return result
