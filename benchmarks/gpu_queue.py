"""Measure on a GPU that is at hand for minutes: jobs in order of value, resumed where they stopped.

    python benchmarks/gpu_queue.py [--limit 480] [--only WORDS] [--out DIR]    run what is not done
    python benchmarks/gpu_queue.py --report        what is measured, stale, failed, never run
    python benchmarks/gpu_queue.py --self-check    every job in a tiny form on the CPU

Each job is a subprocess (gpu_jobs.py lists them), ended at its limit or the queue's. What it has
found is written at once to benchmarks/results/gpu/<device>/, or below --out. Jobs that failed come
last, lest they fail again. A job that would not end in time is left out.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

if str(Path(__file__).resolve().parent) not in sys.path:  # PYTHONSAFEPATH keeps it off
    sys.path.insert(0, str(Path(__file__).resolve().parent))

from gpu_job import KEPT, RUNNING
from gpu_jobs import LIMIT, ROOT, Job, all_jobs
from gpu_results import (
    FAILED,
    MEASURED,
    NEVER,
    PARTIAL,
    RESULTS,
    Entry,
    Store,
    digest_of,
    folder_of,
    now,
)

FOLDER = Path(__file__).resolve().parent
NEEDED = ("torch", "triton", "safetensors", "jinja2", "transformers", "peft", "pytest", "xdist")
MARGIN = 5.0  # seconds that stay for writing results
DEVICE = "import torch; print(torch.cuda.get_device_name(), torch.__version__, sep='\\n')"


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


# --- processes of jobs ---


def is_here(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def job_environment(scratch: Path, *, tiny: bool) -> dict[str, str]:
    """Where jobs find lorafx, this folder, and the tests' helpers; `tiny` ones see no GPU."""
    paths = [str(FOLDER), str(ROOT / "tests" / "helpers"), str(link_lorafx(scratch))]
    paths += [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    always = {"PYTHONSAFEPATH": "1", "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}
    if tiny:
        always |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
        always |= {"LORAFX_CACHE_DIR": str(scratch / "cache")}
    return environment | always | {"PYTHONPATH": os.pathsep.join(paths)}


def link_lorafx(scratch: Path) -> Path:
    """A folder to find lorafx in where it is not installed: a link, and its entry points.

    The root itself must not be on the path, where passes/ and kernels/ would shadow others."""
    folder = scratch / "site"
    folder.mkdir()
    if not is_here("lorafx"):
        (folder / "lorafx").symlink_to(ROOT / "lorafx")
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        source = (ROOT / "lorafx/__init__.py").read_text()
        version = re.findall(r'^__version__ = "(.+)"', source, re.M)[0]
        about = folder / f"lorafx-{version}.dist-info"
        about.mkdir()
        (about / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: lorafx\nVersion: {version}\n"
        )
        with (about / "entry_points.txt").open("w") as file:
            for group, points in project["entry-points"].items():
                lines = [f"{name} = {target}" for name, target in points.items()]
                print(f"[{group}]", *lines, sep="\n", file=file)
    return folder


def stop(process: subprocess.Popen[bytes]) -> int:
    """End the job's processes where they still run; its exit status. What it found is on disk."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # and what it has started
    return process.wait()


# --- the queue ---


class Queue:
    """Runs jobs on one machine, until `options.limit` seconds have passed.

    Raises:
        SystemExit: there is no GPU, or torch cannot be imported.
    """

    def __init__(self, jobs: Sequence[Job], options: argparse.Namespace, scratch: Path) -> None:
        self.jobs, self.options, self.scratch = jobs, options, scratch
        self.end = time.monotonic() + options.limit - MARGIN
        self.environment = job_environment(scratch, tiny=options.self_check)
        self.device = "self-check" if options.self_check else device_here()
        self.store = Store(self.device, options.out)
        self.tried: set[str] = set()

    def left(self) -> float:
        return self.end - time.monotonic()

    def todo(self) -> list[Job]:
        """Jobs to run, in the order in which to run them, whether or not they still fit."""
        states = {job.name: self.store.state(job) for job in self.jobs}
        jobs = [job for job in self.jobs if job.name not in self.tried]
        if not self.options.again:
            jobs = [job for job in jobs if states[job.name] != MEASURED]
        return sorted(jobs, key=lambda job: states[job.name] == FAILED)

    def estimate(self, job: Job) -> float:
        """Seconds that the job took when it was measured here, or that it is thought to take."""
        entry = self.store.entries.get(job.name)
        return float(entry["seconds"]) if entry and entry["status"] == MEASURED else job.estimate

    def run(self) -> list[Job]:
        """Run jobs until none is left that fits; those that are left."""
        while True:
            todo = self.todo()
            job = next((job for job in todo if 1.1 * self.estimate(job) <= self.left()), None)
            if job is None:
                return todo
            self.tried.add(job.name)
            say(f"{job.name}: about {self.estimate(job):.0f} s, {len(todo)} jobs to do")
            entry = self.run_job(job)
            say(f"{job.name}: {entry['status']} in {entry['seconds']:.0f} s; {described(entry)}")
            if entry["status"] == FAILED:
                print(entry["log"], flush=True)

    def run_job(self, job: Job) -> Entry:
        """Run one job; its entry is on disk, and grows there while the job runs."""
        entry = seed(self.store.entries.get(job.name), digest_of(job))
        entry["commit"] = self.options.commit
        self.store.put(job.group, job.name, entry)
        command = [sys.executable, str(FOLDER / "gpu_job.py"), "--device", self.device, job.name]
        command += ["--out", str(self.options.out)] + ["--tiny"] * self.options.self_check
        limit = self.left() if self.options.self_check else min(LIMIT, self.left())
        start, log = time.monotonic(), self.scratch / "log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=self.environment,
                stdout=output,
                stderr=subprocess.STDOUT,
                process_group=0,  # not a session of its own: it is to end with the queue
            )
        killed = "the queue was ended"
        try:
            process.wait(limit)
            killed = ""
        except subprocess.TimeoutExpired:
            queue = "the queue's" if limit < LIMIT else "its"
            killed = f"ended at {queue} limit of {limit:.0f} s"
        finally:
            status = stop(process)
            self.store.take(self.store.folder)
            entry = self.store.entries[job.name]
            entry |= {"date": now(), "seconds": round(time.monotonic() - start, 1)}
            told = log.read_text(errors="replace")[-KEPT:]
            judge(entry, status, killed, cut_off=bool(killed) and limit < LIMIT, log=told)
            self.store.put(job.group, job.name, entry)
        return entry


def device_here() -> str:
    """The folder of the GPU. Asked of another process: the queue itself leaves the GPU alone."""
    told = subprocess.run([sys.executable, "-c", DEVICE], capture_output=True, text=True)
    if told.returncode:
        why = told.stderr.strip().splitlines()[-1:]
        sys.exit(f"gpu_queue.py measures on a GPU, and torch finds none here: {why}")
    return folder_of(*told.stdout.splitlines()[-2:])


def seed(earlier: Entry | None, digest: str) -> Entry:
    """What a job starts from: rows of an earlier run of the same sources, and what failed."""
    entry: Entry = {"status": PARTIAL, "sources": digest, "date": now(), "seconds": 0.0}
    entry |= {"summary": "", "failures": {}, "before": [], "rows": []}
    if earlier is not None:
        failed = [*earlier["failures"], *earlier["before"] * (earlier["status"] != MEASURED)]
        entry["before"] = list(dict.fromkeys(failed))
        if earlier["sources"] == digest and earlier["status"] != MEASURED:
            entry["rows"] = earlier["rows"]
    return entry


def judge(entry: Entry, status: int, killed: str, *, cut_off: bool, log: str) -> None:
    """Set the status of a job that has ended, and what is wrong with it."""
    failures, ended = entry["failures"], entry.pop("ended", False)
    if cut_off:  # nobody's fault
        entry |= {"status": PARTIAL, "why": killed, "log": log}
        entry["failures"] = {key: why for key, why in failures.items() if why != RUNNING}
    elif killed or failures or status or not ended or not entry["rows"]:
        why = killed or f"the process ended with status {status}" * (status or not ended)
        why = why or "it found nothing" * (not failures)
        for key, text in failures.items():
            why = f"{key}: {(text.strip().splitlines() or [''])[-1]}; {len(failures)} in all; {why}"
            break
        entry |= {"status": FAILED, "why": why, "log": log}
    else:
        entry["status"] = MEASURED


def described(entry: Entry) -> str:
    """What was found, in a line."""
    return "; ".join(filter(None, (entry.get("why"), entry["summary"])))


def report(jobs: Sequence[Job], stores: Mapping[str, Store]) -> None:
    """Print the state of every job on every device that has results."""
    row = "{:36}  {:21}  {:16}  {:>4}  {}".format
    for device, store in stores.items():
        states = Counter(store.state(job) for job in jobs)
        counted = ", ".join(f"{count} {state}" for state, count in states.items())
        never = sum(job.estimate for job in jobs if job.name not in store.entries)
        print(f"{device}: {counted}; about {never / 60:.0f} minutes {NEVER}")
        print(row("job", "state", "when (UTC)", "s", "found"))
        for job in jobs:
            found: Entry = {"date": "", "seconds": job.estimate, "summary": ""}
            found = store.entries.get(job.name, found)
            when, seconds = found["date"][:16].replace("T", " "), f"{found['seconds']:.0f}"
            print(row(job.name, store.state(job), when, seconds, described(found)).rstrip())
        print()


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--limit", type=float, default=480.0, help="seconds of this run")
    parser.add_argument("--only", nargs="+", default=[""], help="jobs named so, in part")
    parser.add_argument("--again", action="store_true", help="measured jobs too")
    parser.add_argument("--out", type=Path, default=RESULTS, help="write results below here")
    parser.add_argument("--commit", default="", help="what is measured, where git does not tell")
    parser.add_argument("--report", action="store_true")
    parser.add_argument("--self-check", action="store_true")
    parser.add_argument("--can-run", action="store_true", help="whether this Python can; no output")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    jobs = [job for job in all_jobs() if any(words in job.name for words in options.only)]
    lacking = [package for package in NEEDED if not is_here(package)]
    if options.can_run:
        return bool(lacking)
    if options.report:
        devices = sorted(path.name for path in RESULTS.glob("*")) or ["no GPU has results yet"]
        report(jobs, {device: Store(device, options.out) for device in devices})
        return 0
    if lacking:
        sys.exit(f"{sys.executable} lacks {', '.join(lacking)}")
    # SIGTERM is an exception, so that the running job ends too and its rows are kept.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    with tempfile.TemporaryDirectory(prefix="lorafx-gpu-") as scratch:
        if options.self_check:
            options.limit, options.out = math.inf, Path(scratch) / "found"
        with suppress(OSError):
            git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40"]
            told = subprocess.run(git, capture_output=True, text=True).stdout.strip()
            options.commit = options.commit or told
        queue = Queue(jobs, options, Path(scratch))
        left = [f"{job.name} ({queue.estimate(job):.0f} s)" for job in queue.run()]
    print(f"not run: {'; '.join(left) or 'nothing is left'}")
    states = {job.name: queue.store.state(job) for job in jobs}
    return int(options.self_check and set(states.values()) != {MEASURED})


if __name__ == "__main__":
    sys.exit(main())
