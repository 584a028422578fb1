"""pytest plugin of gpu_tests.py: runs a share of the tests and reports each at once.

    LORAFX_GPU_TESTS = {"lane": k, "lanes": n, "first": [ids], "done": [ids], "report": file}

Tests of `first` go first; of all that there are, lane k takes every n-th, but those `done`. The
report has lines of JSON: that a test starts, and what became of it. A test that leaves the GPU in
error is blamed for it, and the process ends: every later test would fail of the same error.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from gpu_tests import GPU_LOST

ORDER = json.loads(os.environ["LORAFX_GPU_TESTS"])
KEPT = 2500  # characters of what a failure says

_reports: dict[str, list[pytest.TestReport]] = {}


def _tell(**line: Any) -> None:
    with Path(ORDER["report"]).open("a") as file:
        file.write(json.dumps(line) + "\n")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item], config: pytest.Config) -> None:
    first, done = set(ORDER["first"]), set(ORDER["done"])
    ordered = sorted(items, key=lambda item: item.nodeid not in first)
    share = ordered[ORDER["lane"] :: ORDER["lanes"]]
    chosen = [item for item in share if item.nodeid not in done]
    config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
    items[:] = chosen


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    _reports.setdefault(report.nodeid, []).append(report)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    start = time.monotonic()
    _tell(test=item.nodeid, event="start")
    result = yield
    outcome, why = _outcome(_reports.pop(item.nodeid, []))
    lost = _gpu_error()
    if lost:
        outcome, why = "failed", f"left the GPU in error: {lost}\n{why}"
    seconds = round(time.monotonic() - start, 2)
    _tell(test=item.nodeid, event="end", outcome=outcome, why=why[-KEPT:], seconds=seconds)
    if lost:
        os._exit(GPU_LOST)
    return result


def _outcome(reports: list[pytest.TestReport]) -> tuple[str, str]:
    for report in reports:
        if report.failed:
            return "failed", report.longreprtext
    for report in reports:
        if report.skipped:
            return "skipped", report.longreprtext
    return "passed", ""


def _gpu_error() -> str:
    """What a call of the GPU says now; empty where all is well, or the GPU was never used."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return ""
    try:
        torch.cuda.synchronize()
    except Exception as error:
        return str(error)
    return ""
