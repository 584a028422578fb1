"""The loop of the GPU queue: which job is next, its process, its entry on disk."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import gpu_report
from gpu_here import missing
from gpu_jobs import Job
from gpu_results import (
    FAILED,
    MEASURED,
    MENDED,
    PARTIAL,
    ROOT,
    RUNNING,
    Digests,
    Entry,
    Store,
    kept_rows,
    restore,
    state_of,
    write_json,
)

MARGIN = 5.0  # seconds that stay for writing results
GRACE = 3.0  # seconds between asking a job to end and ending it
ATTEMPTS = 2  # of a job that fails though nothing has changed
TAIL = 3000  # characters of output that are kept of a job that failed


class Queue:
    """Runs jobs on one machine.

    Attributes:
        machine: what results are measured on.
        end: when no job may run any more, of time.monotonic.
        say: told what happens.
        launch: makes the command of a job from its name and the file that it writes.
    """

    def __init__(
        self,
        jobs: Sequence[Job],
        store: Store,
        machine: Mapping[str, object],
        end: float,
        *,
        digests: Digests,
        environment: Callable[[Path], dict[str, str]],
        launch: Callable[[Job, Path], list[str]],
        commit: str = "",
        peers: Path = Path(),
        again: bool = False,
    ) -> None:
        self.jobs, self.store, self.machine, self.end = jobs, store, machine, end
        self.digests, self.environment, self.launch = digests, environment, launch
        self.commit, self.peers, self.again = commit, peers, again
        self.tried: set[str] = set()
        self.process: subprocess.Popen[bytes] | None = None

    # --- which ---

    def state(self, job: Job) -> str:
        digest = self.digests.of(job, self.store.entries)
        return state_of(self.store.entries.get(job.name), digest)

    def todo(self) -> list[Job]:
        """Jobs to run, in the order in which to run them, whether or not they still fit."""
        ranked = []
        for place, job in enumerate(self.jobs):
            state = self.state(job)
            entry = self.store.entries.get(job.name, {})
            worn_out = state == FAILED and entry.get("attempts", 1) >= ATTEMPTS
            if job.name in self.tried or ((state == MEASURED or worn_out) and not self.again):
                continue
            rank = {MENDED: 0, FAILED: 2}.get(state, 1)
            ranked.append((rank, place, job))
        return [job for _, _, job in sorted(ranked, key=lambda item: item[:2])]

    def estimate(self, job: Job) -> float:
        """Seconds that the job took when it was measured here, or that it is thought to take."""
        entry = self.store.entries.get(job.name)
        if entry is None or entry["status"] != MEASURED:
            return job.estimate
        return float(entry["seconds"])

    def left(self) -> float:
        return self.end - MARGIN - time.monotonic()

    # --- run ---

    def run(self, scratch: Path, told: gpu_report.Teller) -> list[Job]:
        """Run jobs until none is left that fits; those that are left."""
        while True:
            todo = self.todo()
            ready = [job for job in todo if not missing(job, self.peers)]
            job = next((job for job in ready if 1.1 * self.estimate(job) <= self.left()), None)
            if job is None:
                return todo
            self.tried.add(job.name)
            with told.job(job.name, self.estimate(job), len(todo)):
                entry = self.run_job(job, scratch)
            told.ended(job.name, entry)
            if entry["died"] and entry["attempts"] < ATTEMPTS:
                self.tried.discard(job.name)  # once more at the end, behind the case that broke it

    def run_job(self, job: Job, scratch: Path) -> Entry:
        """Run one job; its entry is on disk, and grows there while the job runs."""
        digest = self.digests.of(job, self.store.entries)
        earlier = self.store.entries.get(job.name)
        folder = Path(tempfile.mkdtemp(dir=scratch))
        part, log = folder / "part.json", folder / "log"
        write_json(part, seed(earlier, digest))
        entry: Entry = {
            "status": PARTIAL,
            "sources": digest,
            "attempts": attempts(earlier, digest) + 1,
            "commit": self.commit,
            "machine": dict(self.machine),
        }
        start, seen = time.monotonic(), part.stat().st_mtime_ns
        limit = min(job.most, self.left())
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                self.launch(job, part),
                cwd=ROOT,
                env=self.environment(self._cache(job, folder)),
                stdout=output,
                stderr=subprocess.STDOUT,
                preexec_fn=os.setpgrp,  # not a session of its own: it is to end with the queue
            )
        killed = False
        try:
            while self.process.poll() is None:
                if part.stat().st_mtime_ns != seen:
                    seen = part.stat().st_mtime_ns
                    self._keep(job, entry, part, start)
                if time.monotonic() - start > limit:
                    killed = True
                    break
                time.sleep(0.05)
        finally:
            status = self.stop()
        found = json.loads(part.read_text())
        entry["status"], why = verdict(found, status, killed, own_limit=limit == job.most)
        entry["died"] = entry["status"] == FAILED and bool(killed or status)
        if why:
            entry["log"] = log.read_text(errors="replace")[-TAIL:]
            if entry["died"] and not killed and not found["failures"]:  # the log alone says more
                why = ": ".join([why, *entry["log"].strip().splitlines()[-1:]])
            entry["why"] = why.replace("{limit}", f"{limit:.0f}")
        return self._keep(job, entry, part, start)

    def stop(self) -> int:
        """End the job's processes where they still run; its exit status."""
        process = self.process
        if process is None:
            return 0
        for ask in (signal.SIGTERM, signal.SIGKILL):
            if process.poll() is not None:
                break
            _signal_group(process.pid, ask)
            try:
                process.wait(GRACE)
            except subprocess.TimeoutExpired:
                continue
        _signal_group(process.pid, signal.SIGKILL)  # what it has started
        self.process = None
        return process.wait()

    def _keep(self, job: Job, entry: Entry, part: Path, start: float) -> Entry:
        found = json.loads(part.read_text())
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        seconds = round(time.monotonic() - start, 1)
        entry |= {"date": now, "seconds": seconds, "summary": found["summary"]}
        entry |= {name: found[name] for name in ("failures", "before", "rows")}
        if entry["status"] == PARTIAL:  # cut off: nobody's fault
            entry["failures"] = {k: w for k, w in entry["failures"].items() if w != RUNNING}
        self.store.put(job.group, job.name, entry)
        return entry

    def _cache(self, job: Job, folder: Path) -> Path:
        """lorafx's cache folder for the job alone: what another has tuned is not to be in it."""
        cache = folder / "cache"
        cache.mkdir()
        for name in job.inputs:
            restore(kept_rows(self.store.entries.get(name, {})), cache)
        return cache


def seed(earlier: Entry | None, digest: str) -> dict[str, Any]:
    """What a job starts from: rows of an earlier run of the same sources, and what failed."""
    nothing: dict[str, Any] = {"rows": [], "failures": {}, "summary": "", "ended": False}
    if earlier is None:
        return nothing | {"before": []}
    failed = list(earlier["failures"])
    if earlier["status"] != MEASURED:
        failed += [name for name in earlier["before"] if name not in failed]
    if earlier["sources"] != digest or earlier["status"] == MEASURED:
        return nothing | {"before": failed}
    return nothing | {"rows": earlier["rows"], "before": failed}


def attempts(earlier: Entry | None, digest: str) -> int:
    """How often the job has failed with these sources."""
    if earlier is None or earlier["sources"] != digest or earlier["status"] != FAILED:
        return 0
    return int(earlier["attempts"])


def verdict(
    found: Mapping[str, Any], status: int, killed: bool, *, own_limit: bool
) -> tuple[str, str]:
    """The status of a job that has ended, and what is wrong with it."""
    if killed and own_limit:
        return FAILED, "killed at its limit of {limit} s"
    if killed:
        return PARTIAL, "cut off at the queue's limit, {limit} s"
    failures = found["failures"]
    if failures:
        name, why = next(iter(failures.items()))
        last = why.strip().splitlines()[-1] if why.strip() else ""
        last += f" with status {status}" if status else ""
        more = f" (and {len(failures) - 1} more)" if len(failures) > 1 else ""
        return FAILED, f"{name}: {last}{more}"
    if status or not found["ended"]:
        return FAILED, f"the process ended with status {status}"
    return MEASURED, ""


def _signal_group(pid: int, number: int) -> None:
    with suppress(ProcessLookupError):
        os.killpg(pid, number)


@contextmanager
def ended_with_jobs(queue: Queue) -> Iterator[None]:
    """SIGTERM is an exception here, so that the running job ends too and its rows are kept."""

    def stop(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        queue.stop()
        signal.signal(signal.SIGTERM, before)
