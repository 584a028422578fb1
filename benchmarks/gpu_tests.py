"""Job: a test file of tests/gpu, its tests in several processes at once.

Most of a test's time is compilation on the CPU, so lanes share the file. A test that ends its
process (a GPU in error, a crash, too long a time) is a failure of its own; its lane goes on with
the next test in a new process. Every outcome is on disk at once.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from gpu_job import Context
from gpu_jobs import ROOT

TEST_LIMIT = 240.0  # seconds of one test
GPU_LOST = 33  # exit status after a test that left the GPU in error; none of pytest's own
ENDED = (0, 1, 5)  # pytest's exit status: all passed, some failed, none to run
TAIL = 1500  # characters of a log that are kept


@dataclass
class Lane:
    """One pytest process after the other, over a share of the file.

    Attributes:
        done: tests that are not to run again.
        test, since: the one that runs, and from when on.
    """

    number: int
    lanes: int
    file: str
    first: Sequence[str]
    done: set[str]
    folder: Path
    processes: int = 0
    test: str = ""
    since: float = 0.0
    process: subprocess.Popen[bytes] | None = field(default=None)
    read: int = 0

    @property
    def report(self) -> Path:
        return self.folder / f"lane{self.number}-{self.processes}.jsonl"

    @property
    def log(self) -> Path:
        return self.report.with_suffix(".log")

    def start(self) -> None:
        """A process for what is left."""
        self.processes, self.read, self.test = self.processes + 1, 0, ""
        self.since = time.monotonic()
        order = {"lane": self.number, "lanes": self.lanes, "first": list(self.first)}
        order |= {"done": sorted(self.done), "report": str(self.report)}
        temporary = self.folder / f"tmp{self.number}-{self.processes}"
        command = [sys.executable, "-m", "pytest", self.file, "-p", "gpu_pytest", "--tb=short"]
        command += ["-p", "no:cacheprovider", f"--basetemp={temporary}"]
        environment = {"LORAFX_GPU_TESTS": json.dumps(order), "TORCHINDUCTOR_COMPILE_THREADS": "2"}
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=os.environ | environment,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def poll(self, context: Context) -> bool:
        """Take in what has happened; whether the lane still runs."""
        if self.process is None:
            return False
        status = self.process.poll()  # before the report is read: what it says then is all
        self._take_in(context)
        if status is None:
            late = time.monotonic() - self.since > TEST_LIMIT
            if late:
                self.process.send_signal(signal.SIGKILL)
                self.process.wait()
                self._blame(context, f"killed after {TEST_LIMIT:.0f} s")
                self.start()
            return True
        if status in ENDED:
            self.process = None
            return False
        if self.test or status == GPU_LOST:
            self._blame(context, f"the process ended with status {status}")
            self.start()
            return True
        why = f"pytest ended with status {status}\n{self._tail()}"
        context.fail(f"{self.file}, lane {self.number}", why)
        self.process = None
        return False

    def _blame(self, context: Context, why: str) -> None:
        if self.test:
            context.fail(self.test, f"{why}\n{self._tail()}")
            self.done.add(self.test)

    def _tail(self) -> str:
        return self.log.read_text(errors="replace")[-TAIL:]

    def _take_in(self, context: Context) -> None:
        if not self.report.exists():
            return
        whole = self.report.read_bytes()
        fresh = whole[self.read : whole.rfind(b"\n") + 1]
        self.read += len(fresh)
        for line in fresh.splitlines():
            told = json.loads(line)
            self.test, self.since = told["test"], time.monotonic()
            if told["event"] == "start":
                continue
            self.done.add(self.test)
            if told["outcome"] == "failed":
                context.fail(self.test, told["why"])
            else:
                row = {name: told[name] for name in ("outcome", "seconds")}
                context.add(self.test, [row])
            self.test = ""
            context.summarise(outcomes(context))


def outcomes(context: Context) -> str:
    counted = Counter(row["outcome"] for row in context.part.rows)
    counted["failed"] = len(context.part.failures)
    return ", ".join(f"{count} {outcome}" for outcome, count in sorted(counted.items()) if count)


def run_file(context: Context, *, file: str, lanes: int) -> None:
    """The tests that have not passed yet, those that failed before in front."""
    lanes = 1 if context.tiny else min(lanes, max(1, (os.cpu_count() or 2) // 2))
    first = context.part.before
    context.part.failures.clear()  # each of them runs again
    done = {row["key"] for row in context.part.rows}
    with tempfile.TemporaryDirectory() as folder:
        running = [
            Lane(number, lanes, file, first, set(done), Path(folder)) for number in range(lanes)
        ]
        for lane in running:
            lane.start()
        while sum(lane.poll(context) for lane in running):
            time.sleep(0.1)
